"""
Models: noise convention, base model, LoRA, discriminators, latent reward, samplers, a student on
disk. Then, under a rule of its own, the plumbing that two scripts need in order to run. What is
learnt, and from which losses, stands in train_stage1.py and train_stage2.py.

The one convention, for networks that predict eps, v or a flow:

    x_t = alpha_t x0 + sigma_t eps      t is what a network is conditioned on, 0..1000, 1000 = noise

References: Flash-DMD (arXiv 2511.20549), DMD2 (2405.14867), ADM (2507.18569) for the heads of the
discriminator, LPO (2502.01051) for the latent reward.
"""

import argparse
import contextlib
import copy
import csv
import ctypes
import difflib
import errno
import fcntl
import functools
import glob
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

HERE = Path(__file__).absolute().parent

# --------------------------------------------------------------------------------------------------
# flags and errors

def die(message):
    """Ends the run with one sentence for the user and exit code 2: one line per machine, as all
    ranks come to the same end."""
    if os.environ.get('LOCAL_RANK', '0') == '0':
        print(f'error: {message}', file=sys.stderr, flush=True)
    if dist.is_initialized():                  # its threads would hold up, or abort, a usual exit
        sys.stdout.flush()
        os._exit(2)
    sys.exit(2)

# what libraries raise for a file that is missing, damaged or something else
BAD_FILE = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, EOFError,
            AssertionError, SafetensorError, pickle.UnpicklingError)

@contextlib.contextmanager
def sentence(words, kinds=BAD_FILE):
    """Ends the run with `words` and the library's own reason where a file inside is a bad one."""
    try:
        yield
    except kinds as error:
        reason = ' '.join(str(error).split())[:200]
        die(f'{words} ({reason or type(error).__name__})')

# flags of diffusers' own scripts, and what they are here
THEIRS = dict(
    train_batch_size='--batch, of all ranks together', max_train_steps='--iters',
    gradient_accumulation_steps='--micro, what a rank takes at once of its share of --batch',
    learning_rate='--student_lr, --fake_lr and --heads_lr', lr_warmup_steps='--warmup',
    lr='--student_lr, --fake_lr and --heads_lr', resume='none: the same command again resumes',
    output_dir='--out', pretrained_model_name_or_path='--model', dataset_name='--data',
    train_data_dir='--data', caption_column='--text_column', checkpointing_steps='--save_every',
    gradient_checkpointing='--grad_checkpointing', guidance_scale='--cfg', rank='--lora',
    num_inference_steps='--steps', num_train_epochs='--iters', report_to='--wandb PROJECT',
    validation_prompt='--prompts FILE', dataloader_num_workers='--workers',
    resume_from_checkpoint='none: the same command again resumes',
    mixed_precision='none: bf16 on CUDA, fp32 elsewhere', resolution="none: it is the model's")

class Parser(argparse.ArgumentParser):
    """argparse's for a page: its docstring as help, with each recipe's default of a flag, no
    abbreviated flags, errors in one sentence. recipes: {name: table of defaults}."""

    def format_help(self):
        for action in self._actions:
            shown = {}                                          # {value: the recipes that have it}
            for name, table in self.recipes.items():
                value = table.get(action.dest, action.default)
                if value not in (None, '', [], argparse.SUPPRESS):
                    value = ' '.join(map(str, value)) if isinstance(value, list) else str(value)
                    shown.setdefault(value, []).append(name)
            words = [value if len(names) == len(self.recipes) else f'{", ".join(names)}: {value}'
                     for value, names in shown.items()]
            if words:
                action.help = f'{action.help} [{"; ".join(words)}]'.replace('%', '%%')
        return super().format_help()

    def parse_args(self, *args, **kwargs):
        """Paths of this repository's assets, from wherever the page was started."""
        found = super().parse_args(*args, **kwargs)
        for name, value in vars(found).items():
            if isinstance(value, str) and value.startswith('assets/') and not Path(value).exists():
                setattr(found, name, str(HERE / value))
        return found

    def error(self, message):
        flags = [name for action in self._actions for name in action.option_strings]
        for word in message.split() if message.startswith('unrecognized') else ():
            if word.startswith('-'):
                name = word.split('=')[0]
                theirs = THEIRS.get(name.strip('-').replace('-', '_'))
                near = difflib.get_close_matches(name, flags, 1)
                hint = f"; here that is {theirs}" if theirs else ''
                hint = hint or (f'; did you mean {near[0]}?' if near else '; see --help')
                die(f'there is no flag {name}{hint}')
        die(f'{message}; see --help')

def parser(doc, recipes=None):
    """The Parser of a page, from whose first line on Ctrl-C and SIGTERM end in one sentence."""
    sys.excepthook = last_words
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    p = Parser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage='%(prog)s [--flag value ...]')
    p.recipes = recipes or {'': {}}
    return p

def give_way(p, flag, *others):
    """The defaults of `others` belong to the default of --flag: they become '' in the
    ArgumentParser p where the command line names another."""
    if vars(p.parse_known_args()[0])[flag] != p.get_default(flag):
        p.set_defaults(**dict.fromkeys(others, ''))

def settings(args):
    """What is written down of args: {flag: value}, assets of this repository as from its folder."""
    assets = f'{HERE}/assets/'
    return {name: value.removeprefix(f'{HERE}/') if str(value).startswith(assets) else value
            for name, value in vars(args).items()}

def at_least(args, **least):
    """Ends with a sentence for the first flag below its least value, or nan or infinite."""
    for flag, value in least.items():
        if not value <= getattr(args, flag) < float('inf'):
            die(f'--{flag} {getattr(args, flag)} must be at least {value}, and finite')

def at_most(args, **most):
    """Ends with a sentence for the first flag above its greatest value."""
    for flag, value in most.items():
        if getattr(args, flag) > value:
            die(f'--{flag} {getattr(args, flag)} must be at most {value}')

# --------------------------------------------------------------------------------------------------
# randomness: everything comes from (seed, iteration, sample), so a run does not depend on the
# number of ranks or the micro-batch, and resuming needs no generator state

def generator(*key):
    """A CPU generator for a tuple of non-negative integers; other tuples, other streams."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> 1))

def draw(seed, it, samples, shape):
    """Random numbers of iteration `it` for the given samples, whichever rank has them.

    shape: of one sample's normals, e.g. (9, C, h, w). Returns normals (len(samples), *shape) and
    uniforms in [0, 1), (len(samples), 4); both float32 on the CPU.
    """
    streams = [generator(seed, it, int(i)) for i in samples]
    normals = [torch.randn(shape, generator=g) for g in streams]
    uniforms = [torch.rand(4, generator=g) for g in streams]
    return torch.stack(normals), torch.stack(uniforms)

# --------------------------------------------------------------------------------------------------
# the noise convention

class Schedule:
    """alpha(t), sigma(t) and the conversions of one diffusers scheduler; t (B,) in 0..1000, fp32.

    kind is 'epsilon' or 'v_prediction' (variance preserving, from alphas_cumprod;
    v = alpha eps - sigma x0) or 'flow' (sigma = t / 1000, alpha = 1 - sigma, v = eps - x0). tokens:
    of a picture; with them grows the shift of flows that call it dynamic.
    """

    def __init__(self, scheduler, tokens=4096):
        config, name = scheduler.config, type(scheduler).__name__
        flow = 'FlowMatch' in name or config.get('use_flow_sigmas')
        self.kind = 'flow' if flow else config.get('prediction_type')
        self.shift = config.get('shift', config.get('flow_shift', 1.))
        if config.get('use_dynamic_shifting'):
            share = (tokens - config.base_image_seq_len) / (
                config.max_image_seq_len - config.base_image_seq_len)
            mu = config.base_shift + share * (config.max_shift - config.base_shift)
            self.shift = math.exp(mu) if config.time_shift_type == 'exponential' else mu
        if self.kind not in ('flow', 'epsilon', 'v_prediction'):
            die(f'--model: its scheduler predicts {self.kind!r}; only epsilon, v_prediction and '
                'flow matching are known')
        if flow:
            return
        bars = getattr(scheduler, 'alphas_cumprod', ())
        if len(bars) != 1000:
            die(f'--model: its scheduler, {name}, has no table of 1000 noise levels as SDXL has; a '
                'base trained in the EDM formulation cannot be distilled')
        self.bars = bars.double().cpu()
        # diffusers writes 2 ** -24 for the 0 of some schedulers; SDXL ends at .0047
        if self.kind == 'epsilon' and self.bars[-1] < 1e-6:
            die('--model: its scheduler ends in pure noise (rescale_betas_zero_snr), where a '
                'network that predicts epsilon says nothing of x0; give a base that predicts v, or '
                'set it to false in scheduler_config.json if the network was trained without')

    def _bar(self, t):
        self.bars = self.bars.to(t.device)
        return self.bars[t.long()]

    def alpha(self, t):
        """(B,) -> (B, 1, 1, 1)."""
        a = 1 - t.double() / 1000 if self.kind == 'flow' else self._bar(t).sqrt()
        return a.float().view(-1, 1, 1, 1)

    def sigma(self, t):
        """(B,) -> (B, 1, 1, 1)."""
        s = t.double() / 1000 if self.kind == 'flow' else (1 - self._bar(t)).sqrt()
        return s.float().view(-1, 1, 1, 1)

    def snr(self, t):
        """(alpha / sigma)^2, (B,) -> (B,)."""
        return ((self.alpha(t) / self.sigma(t)) ** 2).flatten()

    def low_noise(self, t):
        """True where SNR >= 1, the steps of the pixel GAN; SD3's last step, t = 500, has SNR 1."""
        return self.snr(t) >= 1 - 1e-6

    def noised(self, x0, eps, t):
        """x_t = alpha_t x0 + sigma_t eps; (B, C, h, w)."""
        return self.alpha(t) * x0 + self.sigma(t) * eps

    def x0(self, out, xt, t):
        """The network's output -> x0, in fp32: at t = 999 bf16 arithmetic is 41 % wrong."""
        out = out.float()
        xt = xt.float()
        if self.kind == 'epsilon':
            return (xt - self.sigma(t) * out) / self.alpha(t)
        if self.kind == 'v_prediction':
            return self.alpha(t) * xt - self.sigma(t) * out
        return xt - self.sigma(t) * out

    def target(self, x0, eps, t):
        """What the network is trained to output for x_t."""
        if self.kind == 'epsilon':
            return eps
        if self.kind == 'v_prediction':
            return self.alpha(t) * eps - self.sigma(t) * x0
        return eps - x0

    def steps(self, n):
        """n evenly spaced student steps from pure noise on: 4 gives 999, 749, 499, 249, or for
        flow matching with shift 3: 1000, 900, 750, 500."""
        if self.kind == 'flow':
            return self._shifted(torch.arange(n, 0, -1).double() / n).float()
        return 999. - torch.arange(n) * 1000 // n

    def _shifted(self, u):
        """A flow's noise level u in [0, 1] -> t, moved towards noise (SD3, 2403.03206, eq. 23)."""
        return 1000 * self.shift * u / (1 + (self.shift - 1) * u)

    def between(self, u, low, high):
        """Uniforms u in [0, 1) -> times in [low, high]: whole numbers where the schedule is a
        table, for a flow what the shift makes of them."""
        if self.kind == 'flow':
            return self._shifted((low + (high - low) * u) / 1000)
        return (low + (high - low + 1) * u).floor()

    def training(self, u):
        """Uniforms u in [0, 1) -> the times at which a network of this kind learns its own target:
        uniform over the table, for a flow logit-normal and shifted (SD3)."""
        if self.kind == 'flow':
            return self._shifted(torch.special.ndtri(u).sigmoid())
        return self.between(u, 0, 999)

    def beta(self, u, a, b):
        """Uniforms u in [0, 1) -> times whose 1000th part is Beta(a, b), a, b >= 1, by its inverse
        distribution: DMDR's, raw, without a flow's shift; rounded where the schedule is a table."""
        x = np.linspace(0, 1, 4097)
        middle = (x[1:] + x[:-1]) / 2
        mass = np.append(0, np.cumsum(middle ** (a - 1) * (1 - middle) ** (b - 1)))
        t = 1000 * torch.from_numpy(np.interp(u.double().cpu(), mass / mass[-1], x)).to(u)
        return t if self.kind == 'flow' else t.round().clamp(max=999)

# --------------------------------------------------------------------------------------------------
# the base model: a diffusers pipeline taken apart. All that differs between families stands in the
# subclass of a family

def load_pipeline(name, flag, dtype=None, t5=None, base_lora=()):
    """DiffusionPipeline from a folder or a hub id, dtype as diffusers takes it; None: what it draws
    in, its family's half precision on a card, else float32.

    t5: of an SD3 pipeline's third text encoder, False leaves it on the disk, True insists on it,
    None takes what is there. base_lora: [file, weight] of a LoRA to merge into it, or nothing.
    """
    import diffusers
    quiet()
    folder = Path(name)
    index = folder / 'model_index.json'
    if folder.is_dir() and not index.exists():
        die(f'{flag} {name} is not a diffusers pipeline folder (it has no model_index.json)')
    if not folder.exists() and not hub_id(name):
        die(f'{flag} {name} does not exist')
    trouble = 'is damaged or not a pipeline of safetensors files'
    if folder.is_file():
        trouble = ('is not the .safetensors file of an SDXL or SD3 model, or the settings of its '
                   'kind could not be downloaded; a diffusers folder has them: save_pretrained')
    if not folder.exists():
        trouble = f'could not be loaded or downloaded; {flag} assets/toy/sdxl runs offline'
    if dtype is None:
        cuda = torch.cuda.is_available()
        dtype = FAMILIES.get(class_of(name, fetch=True), Base).half if cuda else torch.float32
    with sentence(f'{flag} {name} {trouble}'):
        # a pipeline saved without its T5 has to be told so again
        parts = json.loads(index.read_text()) if index.exists() else {}
        without = {k: None for k in ('text_encoder_3', 'tokenizer_3')
                   if t5 is False or parts.get(k) == [None, None]}
        if folder.is_file():
            pipe = load_file_of_all(name, dtype, without)
        else:
            pipe = from_files(diffusers.DiffusionPipeline, name, dtype=dtype, **without)
    if t5 and not getattr(pipe, 'text_encoder_3', None):
        die(f'--t5: {flag} {name} has no T5 text encoder; leave --t5 away, or use --no-t5')
    if base_lora:
        merge_lora(pipe, base_lora)
    return pipe

def lora_and_weight(words):
    """FILE [weight], 1 without -> (file, weight, how many modules it changes), by the file's header
    alone; ends with a sentence where it is no LoRA."""
    file, *rest = map(str, words)
    if not Path(file).is_file():
        die(f'--base_lora {file} is not there, or no file; give a LoRA of the model as one '
            f'.safetensors file (a run keeps its own in student/{BASE_LORA})')
    with sentence(f'--base_lora {file} {" ".join(rest)} is not a file and one weight'):
        weight, = map(float, rest or [1.])
        assert abs(weight) < float('inf')
    with sentence(f'--base_lora {file} is no plain LoRA in safetensors'):
        names = [*safe_open(file, 'pt').keys()]
        pairs = sum(bool(re.search(r'lora_A|lora_down|lora\w*\.down', k)) for k in names)
        odd = [k for k in names if 'dora_scale' in k or 'magnitude' in k]
        assert pairs and not odd, f'{odd[0]} is of a DoRA' if odd else 'it has no pairs of factors'
    return file, weight, pairs

def merge_lora(pipe, base_lora, parts=None):
    """Adds weight x LoRA to the weights of a pipeline's networks, or of `parts` of them. All of the
    file has to find its place: diffusers passes over what does not fit."""
    from peft.tuners.lora import LoraLayer
    file, weight, pairs = lora_and_weight(base_lora)
    with sentence(f'--base_lora {file} could not be merged into this {type(pipe).__name__}: it is '
                  'of another base model, or damaged'):
        pipe.load_lora_weights(str(Path(file).absolute().parent), weight_name=Path(file).name)
        nets = [net for net in pipe.components.values() if isinstance(net, nn.Module)]
        found = sum(isinstance(layer, LoraLayer) for net in nets for layer in net.modules())
        assert found >= pairs, f'{found} of its {pairs} modules are there'
        # safe: NaNs are a ValueError
        pipe.fuse_lora(parts or pipe._lora_loadable_modules, lora_scale=weight, safe_fusing=True)
        pipe.unload_lora_weights()

def from_files(kind, name, **how):
    """A pipeline or network of diffusers from a folder or a hub id, of *.fp16.safetensors where
    there are no others; or from one .safetensors file, configured by a model_index.json beside it
    and its folders, else by diffusers' choice from the weights' names, a few kB of the hub's."""
    if Path(name).is_file():
        folder = Path(name).absolute().parent
        if (folder / 'model_index.json').exists():
            how['config'] = str(folder)
        return kind.from_single_file(str(name), **how)
    how['use_safetensors'] = True
    try:
        return kind.from_pretrained(str(name), **how)
    except BAD_FILE as error:
        with contextlib.suppress(*BAD_FILE):
            return kind.from_pretrained(str(name), variant='fp16', **how)
        raise error

def class_of(name, fetch=False):
    """The class of a pipeline (folder, hub id, one file) by its model_index.json, or the names of a
    file's weights; '' where that is not on this machine, nor to be had with fetch."""
    from huggingface_hub import hf_hub_download
    with contextlib.suppress(Exception):                       # loading it says what is wrong
        if Path(name).is_file():
            sd3 = any('joint_blocks' in key for key in safe_open(name, 'pt').keys())
            return 'StableDiffusion3Pipeline' if sd3 else 'StableDiffusionXLPipeline'
        index = Path(name, 'model_index.json')
        if not index.exists():
            index = Path(hf_hub_download(str(name), 'model_index.json', local_files_only=not fetch))
        return json.loads(index.read_text())['_class_name']
    return ''

def load_file_of_all(file, dtype, without):
    """The pipeline in one .safetensors file, as SDXL's fine-tunes are published."""
    import diffusers
    names = {*safe_open(file, 'pt').keys()}
    kind = getattr(diffusers, class_of(file))
    dtype = dtype['default'] if isinstance(dtype, dict) else dtype
    without = without if kind is diffusers.StableDiffusion3Pipeline else {}
    pipe = from_files(kind, file, dtype=dtype, **without)
    vae = from_files(type(pipe.vae), file, subfolder='vae', dtype=torch.float32)      # SDXL's: fp32
    pipe.register_modules(vae=vae)
    if 'v_pred' in names:                       # marks of fine-tunes, which diffusers does not read
        pipe.register_modules(scheduler=type(pipe.scheduler).from_config(
            pipe.scheduler.config, prediction_type='v_prediction',
            rescale_betas_zero_snr='ztsnr' in names))
    return pipe

def check_sources(args):
    """Ends with one sentence that names all that a training script's run lacks: repositories of the
    hub that are neither here nor to be had, with their licences, and the library of --wandb."""
    if args.base_lora:
        lora_and_weight(args.base_lora)
    typed = {word.split('=')[0] for word in sys.argv}
    for flag in ('--data', '--data_files', '--data_limit') if args.prompts_only else ():
        if flag in typed:
            die(f'--prompts_only {args.prompts_only} takes the place of {flag}: leave {flag} away, '
                "or give --prompts_only ''")
    if args.prompts_only and args.gan != 'none':
        die(f'--prompts_only has no pictures for --gan {args.gan}: use --gan none, or --data')
    words = []
    if args.wandb and not importlib.util.find_spec('wandb'):
        words.append('--wandb needs wandb: pip install wandb')
    kinds = [('model', 'model')]
    if not args.prompts_only:
        kinds.append(('data', 'dataset'))
    if 'latent' in getattr(args, 'reward', ''):
        kinds.append(('lrm', 'model'))
    for flag, kind in kinds if dist.get_rank() == 0 else ():
        name = '/'.join(vars(args)[flag].split('/')[:2])               # lrm: owner/name/subfolder
        if not Path(vars(args)[flag]).exists() and hub_id(name):
            words.append(unreachable(f'--{flag} {name}', name, kind))
    words = '; '.join(filter(None, gathered(words)[0]))
    if words:
        die(f'{words}. --recipe toy needs no network')

def unreachable(what, name, kind):
    """Why a repository of the hub is neither here nor to be had, '' if it is. kind: 'model' or
    'dataset'."""
    import huggingface_hub as hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    with contextlib.suppress(Exception):
        hub.snapshot_download(name, repo_type=kind, local_files_only=True)
        return ''
    if kind == 'dataset':                                  # datasets has a cache of its own
        import datasets
        if Path(datasets.config.HF_DATASETS_CACHE, name.replace('/', '___')).exists():
            return ''
    page = f'https://huggingface.co/{"datasets/" if kind == "dataset" else ""}{name}'
    try:
        hub.HfApi().auth_check(name, repo_type=kind)
        return ''
    except GatedRepoError:
        return f'{what}: accept its licence at {page}, then `hf auth login`'
    except RepositoryNotFoundError:
        return f'{what}: there is no {page}, or it is private: `hf auth login`'
    except Exception:                                  # offline, a proxy, the hub's own trouble
        return f'{what} is not on this machine, and {page} cannot be reached'

def hub_id(name):
    """Whether a name that is no path can be one on the Hugging Face hub, owner/name."""
    return str(name).count('/') == 1 and str(name)[0] not in './~'

def text_length(pipe):
    """Arguments for encode_prompt and a call of an SD3 pipeline that fix the length of its T5
    context: 256 tokens as diffusers has it, but without a T5 as many zeros as CLIP has tokens,
    SD3's own training, not 256."""
    return dict(max_sequence_length=256 if pipe.text_encoder_3 else pipe.tokenizer_max_length)

def load_base(name, device='cpu', dtype=torch.float32, t5=None, offload=False, base_lora=()):
    """Base of a pipeline folder or hub id. dtype is the teacher's and the text encoders'; the VAE
    stays in fp32, because SDXL's overflows in fp16. t5 and base_lora as for load_pipeline; with
    offload the text encoders wait in main memory between calls."""
    pipe = load_pipeline(name, '--model', {'vae': torch.float32, 'default': dtype}, t5, base_lora)
    family = family_of(pipe)
    if family is Base:
        die(f'--model {name} is a {type(pipe).__name__}; this version distils models of '
            f'{", ".join(FAMILIES)}. Another is a subclass of Base in model.py')
    channels, depth = network_of(pipe).config.in_channels, family.depth(pipe)
    if channels != depth:
        die(f'--model {name}: its network reads {channels} channels, its VAE makes {depth} of '
            'them; models that fill in or edit pictures cannot be distilled')
    if not isinstance(family.side(pipe), int):
        die(f'--model {name}: its network has no sample_size, or not one number; write it into its '
            f'config.json, the side of its pictures / {pipe.vae_scale_factor}')
    return family(str(name), pipe, torch.device(device), offload, base_lora)

def family_of(pipe):
    """The subclass of Base of a pipeline, Base itself for one that is not known."""
    return FAMILIES.get(type(pipe).__name__, Base)

class Base:
    """A pretrained text-to-image pipeline: text encoders, VAE, schedule and the frozen teacher.

    Networks are called as base.x0(net, xt, t, y, cfg) or base.predict(net, xt, t, y): net the
    teacher or any copy of it, xt (B, C, h, w) latents, t (B,), y = base.encode(prompts).

    A family says what differs: its network's place in a pipeline (part), what a LoRA or one file
    of it is called by other tools (architecture), which recipe has its sizes (recipe), and the
    methods up to __init__.
    """

    reads = {'': 77, '_2': 77, '_3': 256}                 # tokens that each text encoder reads
    unguided = 'guidance_scale=0'                         # of a pipeline's call, as on a card
    published_side = None                             # where a network's config has no sample_size
    # what it draws in on a card. float16 is finer, but only SDXL's and SD3's activations are within
    # its range: Z-Image's pictures are black in it (Tongyi-MAI/Z-Image#14)
    half = torch.bfloat16

    @staticmethod
    def depth(pipe):
        """The channels of the network's input that the VAE fills."""
        return pipe.vae.config.latent_channels

    @classmethod
    def side(cls, pipe):
        """A side of the latents."""
        return network_of(pipe).config.get('sample_size', cls.published_side)

    @staticmethod
    def called(pipe, cfg, count):
        """Arguments of a pipeline's call for `count` pictures with guidance cfg."""
        return dict(guidance_scale=cfg)

    def encode_with(self, pipe, prompts):
        """encode() by the text encoders of pipe."""
        raise NotImplementedError

    def encode_nothing(self, pipe):
        """What guidance leads away from, (1, ...), as the pipeline has it."""
        return self.encode_with(pipe, [''])

    def call(self, net, xt, t, y):
        """net's own output, (B, C, h, w)."""
        raise NotImplementedError

    def unread(self):
        """Names of the network's modules that its output does not depend on: they stay frozen."""
        return []

    def guided(self, cond, uncond, cfg):
        """Both outputs -> the guided one, (B, C, h, w)."""
        return uncond + cfg * (cond - uncond)

    def pack(self, x):
        """Latents (B, C, h, w) as the pipeline takes and gives them; unpack: the inverse."""
        return x

    unpack = pack

    @staticmethod
    def to_pixels(vae, z):
        """The VAE's decoder: its own latents (B, C, h, w) -> (B, 3, H, W)."""
        return vae.decode(z).sample

    @staticmethod
    def to_latents(vae, pixels):
        """The mean of its encoder: (B, 3, H, W) -> (B, C, h, w)."""
        return vae.encode(pixels).latent_dist.mean

    def __init__(self, name, pipe, device, offload=False, base_lora=()):
        self.name = name
        self.base_lora = base_lora                              # merged into the pipeline's weights
        # what a student is saved with, whatever becomes of the file while a run goes on
        self.base_lora_bytes = Path(base_lora[0]).read_bytes() if base_lora else b''
        self.pipe = pipe
        self.device = device
        pipe.set_progress_bar_config(disable=True)
        self.teacher = getattr(pipe, self.part).eval().to(device)
        self.network = type(self.teacher)               # FSDP2 gives its networks other classes
        self.vae = pipe.vae.eval().to(device)
        if not self.vae._supports_gradient_checkpointing:
            self.vae.enable_gradient_checkpointing = functools.partial(checkpoint_decoder, self.vae)
        encoders = (pipe.components.get(f'text_encoder{k}') for k in ('', '_2', '_3'))
        self.encoders = [net for net in encoders if net]
        for net in (self.teacher, self.vae, *self.encoders):
            net.requires_grad_(False)
        side = self.side(pipe)
        self.tokens = (side // 2) ** 2                      # of a transformer, each 2 x 2 latents
        self.schedule = Schedule(pipe.scheduler, self.tokens)
        self.size = side * pipe.vae_scale_factor                                            # pixels
        self.latent_shape = (self.vae.config.get('z_dim', self.depth(pipe)), side, side)
        self.waiting = self.encoders if offload else []
        if not offload:
            pipe.to(device)
        with torch.no_grad(), self.on_device():
            self.uncond = self.encode_nothing(pipe)

    @contextlib.contextmanager
    def on_device(self):
        """Brings text encoders that wait in main memory to the device and back."""
        for net in self.waiting:
            net.to(self.device)
        yield
        for net in self.waiting:
            net.to('cpu')

    @torch.no_grad()
    def encode(self, prompts):
        """B strings -> y, a tuple of tensors (B, ...): embeddings (B, L, D), pooled (B, P); of
        Qwen-Image the second is a mask (B, L), of Z-Image lengths (B, 1)."""
        with self.on_device():
            return self.encode_with(self.pipe, list(prompts))

    def trainable(self, lora=None):
        """A copy of the teacher to train: with fp32 weights of its own, read from the files, not
        from the bf16 teacher, into main memory, from where parallel() takes them; or, given a peft
        LoraConfig, with the teacher's own frozen tensors and new fp32 adapters."""
        if lora is None:
            net = from_files(self.network, self.name, subfolder=self.part, dtype=torch.float32)
            if self.base_lora:
                pipe = type(self.pipe)(**self.pipe.components | {self.part: net})
                merge_lora(pipe, self.base_lora, [self.part])
            net.requires_grad_()                                  # peft has frozen what it merged
            for name in self.unread():
                net.get_submodule(name).requires_grad_(False)
            return net.train()
        net = twin(self.teacher)
        if self.unread():
            lora = copy.copy(lora)
            lora.exclude_modules = rf'({"|".join(map(re.escape, self.unread()))})(\..*)?'
        net.add_adapter(lora)
        for w in trained(net).values():
            w.data = w.data.to(self.device, torch.float32)
        return net.train()

    def cut(self, prompts):
        """How many prompts are longer than what any of the text encoders reads."""
        read = [(getattr(self.pipe, f'tokenizer{k}', None), n) for k, n in self.reads.items()]
        return sum(all(len(tokenizer(text, verbose=False).input_ids) > length
                       for tokenizer, length in read if tokenizer) for text in prompts)

    def autocast(self):
        """bf16 autocast on CUDA, nothing elsewhere."""
        cuda = self.device.type == 'cuda'
        return torch.autocast(self.device.type, torch.bfloat16, enabled=cuda)

    def predict(self, net, xt, t, y):
        """net's own output at (xt, t) under y, (B, C, h, w) float32; bf16 inside on CUDA."""
        # clones: torch.compile compiles anew for other strides, those of slices and expanded times
        xt = xt.clone(memory_format=torch.contiguous_format)
        t = t.clone(memory_format=torch.contiguous_format)
        with self.autocast():
            return self.call(net, xt, t, y).float()

    def x0(self, net, xt, t, y, cfg=1.):
        """Predicted clean latents, fp32; guided as uncond + cfg (cond - uncond) where cfg != 1."""
        if cfg == 1:
            return self.schedule.x0(self.predict(net, xt, t, y), xt, t)
        # uncond's text is the shorter one: zeros behind it
        both = [pad_sequence([*c, *[u[0]] * len(c)], True) for c, u in zip(y, self.uncond)]
        out = self.predict(net, torch.cat([xt, xt]), torch.cat([t, t]), both)
        return self.schedule.x0(self.guided(*out.chunk(2), cfg), xt, t)

    def _statistics(self):
        """The VAE's scale, shift, mean and std of latents, 1 or 0 where it has none."""
        config = self.vae.config
        scale, shift = config.get('scaling_factor') or 1, config.get('shift_factor') or 0
        mean, std = config.get('latents_mean'), config.get('latents_std')
        if None in (mean, std):
            return scale, shift, 0., 1.
        mean, std = (torch.tensor(x, device=self.device).view(1, -1, 1, 1) for x in (mean, std))
        return scale, shift, mean, std

    def decode(self, z):
        """Latents (B, C, h, w) -> pixels (B, 3, H, W), about [-1, 1], differentiable."""
        scale, shift, mean, std = self._statistics()
        return self.to_pixels(self.vae, (z / scale + shift) * std + mean)

    @torch.no_grad()
    def latents(self, pixels):
        """The inverse of decode: pixels (B, 3, H, W) in [-1, 1] -> mean latents (B, C, h, w)."""
        scale, shift, mean, std = self._statistics()
        return ((self.to_latents(self.vae, pixels) - mean) / std - shift) * scale

    @torch.no_grad()
    def pictures(self, z):
        """decode() to look at, one by one: at 1024 px each takes 3.2 GB (tests/bench.py)."""
        return torch.cat([self.decode(one[None]).float() for one in z])

    @torch.no_grad()
    def teacher_samples(self, prompts, noise, steps, cfg, micro):
        """The teacher's pictures by its own scheduler, `micro` at a time: noise (B, C, h, w) ->
        (B, 3, H, W). Every rank calls it, as the teacher may be sharded."""
        found, began = [], time.time()
        for k in bar(range(0, len(prompts), micro), "the teacher's pictures"):
            latents = self.pack(noise[k:k + micro].to(self.device, self.teacher.dtype))
            with self.on_device():
                z = self.pipe(
                    prompts[k:k + micro], num_inference_steps=steps, latents=latents,
                    output_type='latent', **self.called(self.pipe, cfg, len(latents))).images
            found.append(self.pictures(self.unpack(z).float()))
        print0(f"the teacher's pictures: {steps} steps, {time.time() - began:.1f} s")
        return torch.cat(found)

    def features(self, net, xt, t, y):
        """What the first half of net makes of (xt, t, y): a list of maps (B, C, h, w) float32, the
        last of them the bottleneck that DMD2's discriminator looks at. The other half is not
        computed. net must be the bare module, not its DDP wrapper; a sharded one (FSDP2) gives the
        weights of its root back in the backward pass, which must follow but under no_grad."""
        found = []
        blocks = self.first_half(net)

        def keep(block, inputs, output):
            found.append(self.feature_map(block, output).float())
            if block is blocks[-1]:
                raise HalfWay

        # forward hooks do not go into a compiled graph
        with contextlib.ExitStack() as stack, torch.compiler.set_stance('force_eager'):
            for block in blocks:
                stack.callback(block.register_forward_hook(keep).remove)
            with contextlib.suppress(HalfWay):
                self.predict(net, xt, t, y)
        if isinstance(net, FSDPModule) and not torch.is_grad_enabled():
            net.reshard()
        return found

class HalfWay(Exception):
    """Ends a forward pass after the first half of a network."""

def checkpoint_decoder(vae):
    """enable_gradient_checkpointing for the decoder of a VAE that has it not, block by block."""
    for block in [vae.decoder.mid_block, *vae.decoder.up_blocks]:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)

class SDXL(Base):
    half = torch.float16
    part = 'unet'
    architecture = 'stable-diffusion-xl-v1-base'
    recipe = 'sdxl'
    second_half = ['up_blocks', 'conv_norm_out', 'conv_out']

    def encode_with(self, pipe, prompts):
        return pipe.encode_prompt(
            prompts, device=self.device, do_classifier_free_guidance=False)[::2]

    def encode_nothing(self, pipe):
        # zeros where force_zeros_for_empty_prompt says so
        return pipe.encode_prompt(
            [''], device=self.device, do_classifier_free_guidance=True)[1::2]

    def call(self, net, xt, t, y):
        # original size, top left corner of the crop, target size
        sizes = [self.size, self.size, 0, 0, self.size, self.size]
        sizes = torch.tensor(sizes, device=xt.device).expand(len(xt), 6)
        extra = dict(text_embeds=y[1], time_ids=sizes)
        return net(xt, timestep=t, encoder_hidden_states=y[0], added_cond_kwargs=extra).sample

    def first_half(self, net):
        return [*net.down_blocks, net.mid_block]

    def feature_map(self, block, output):
        # a down block gives its result and a residual for each resnet and for the downsampler
        return output[1][len(block.resnets) - 1] if isinstance(output, tuple) else output

    def channels(self, net):
        """The channels of the maps of features()."""
        return [*net.config.block_out_channels, net.config.block_out_channels[-1]]

class SD3(Base):
    half = torch.float16
    part = 'transformer'
    architecture = 'stable-diffusion-3'
    recipe = 'sd3'
    second_half = ['norm_out', 'proj_out']                                # and half of the blocks

    @staticmethod
    def called(pipe, cfg, count):
        return dict(guidance_scale=cfg, **text_length(pipe))

    def encode_with(self, pipe, prompts):
        return pipe.encode_prompt(
            prompts, prompt_2=None, prompt_3=None, device=self.device,
            do_classifier_free_guidance=False, **text_length(self.pipe))[::2]

    def call(self, net, xt, t, y):
        return net(xt, timestep=t, encoder_hidden_states=y[0], pooled_projections=y[1]).sample

    def first_half(self, net):
        return list(net.transformer_blocks[:max(1, net.config.num_layers // 2)])

    def feature_map(self, block, output):
        image = output[1]                                                            # (B, h w, C)
        return image.transpose(1, 2).unflatten(2, (round(image.shape[1] ** .5), -1))

    def channels(self, net):
        return [net.inner_dim] * len(self.first_half(net))

class QwenImage(SD3):
    """Blocks as SD3's, tokens of 2 x 2 latents, one text encoder and a mask, a VAE of videos."""

    half = Base.half
    architecture = 'qwen-image'
    recipe = 'qwen'
    reads = {'': 512}
    unguided = 'true_cfg_scale=1'
    published_side = 128

    @staticmethod
    def depth(pipe):
        return 4 * pipe.vae.config.z_dim

    @staticmethod
    def called(pipe, cfg, count):
        size = QwenImage.side(pipe) * pipe.vae_scale_factor
        guided = dict(true_cfg_scale=cfg, negative_prompt=[' '] * count) if cfg > 1 else {}
        return dict(true_cfg_scale=1., height=size, width=size) | guided

    def encode_with(self, pipe, prompts):
        text, mask = pipe.encode_prompt(prompts, device=self.device, max_sequence_length=512)
        mask = torch.ones_like(text[..., 0]) if mask is None else mask
        # few lengths, for torch.compile, and none is shorter than that of ' '
        missing = -text.shape[1] % 64
        return F.pad(text, (0, 0, 0, missing)), F.pad(mask.bool(), (0, missing))

    def encode_nothing(self, pipe):
        return self.encode_with(pipe, [' '])

    def unread(self):
        # what the last block makes of the text
        last = f'transformer_blocks.{len(self.teacher.transformer_blocks) - 1}'
        return [f'{last}.attn.to_add_out', f'{last}.txt_mlp']

    def call(self, net, xt, t, y):
        shape = 1, xt.shape[2] // 2, xt.shape[3] // 2
        out = net(self.pack(xt), timestep=t / 1000, encoder_hidden_states=y[0],
                  encoder_hidden_states_mask=y[1], img_shapes=[[shape]] * len(xt))
        return self.unpack(out.sample)

    def guided(self, cond, uncond, cfg):
        # a token is as long as the conditional one
        cond, out = self.pack(cond), self.pack(super().guided(cond, uncond, cfg))
        return self.unpack(out * cond.norm(dim=-1, keepdim=True) / out.norm(dim=-1, keepdim=True))

    def pack(self, x):
        return F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)

    def unpack(self, x):
        return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (round(x.shape[1] ** .5), -1)), 2)

    @staticmethod
    def to_pixels(vae, z):
        # without the cache of a video's earlier frames, and without the clamp
        return vae.decoder(vae.post_quant_conv(z[:, :, None]))[:, :, 0]

    @staticmethod
    def to_latents(vae, pixels):
        return vae.encode(pixels[:, :, None]).latent_dist.mean[:, :, 0]

class ZImage(SD3):
    """One sequence of tokens, those of 2 x 2 latents and behind them the text's, as long as it is.
    It predicts x0 - eps, its time is 1 where nothing is noise, and guidance w = --cfg is its
    pipeline's guidance_scale w - 1: cond + (w - 1) (cond - uncond)."""

    half = Base.half
    architecture = 'z-image'
    recipe = 'zimage'
    reads = {'': 504}                                  # 512 with the chat's frame around the prompt
    published_side = 128

    @staticmethod
    def called(pipe, cfg, count):
        size = ZImage.side(pipe) * pipe.vae_scale_factor
        return dict(guidance_scale=cfg - 1, height=size, width=size)

    def encode_with(self, pipe, prompts):
        texts, _ = pipe.encode_prompt(prompts, self.device, do_classifier_free_guidance=False)
        # lengths (B, 1) on the CPU, where reading them waits for nothing
        return pad_sequence(texts, True), torch.tensor([[len(text)] for text in texts])

    def call(self, net, xt, t, y):
        texts = [text[:length] for text, length in zip(y[0], y[1].flatten().tolist())]
        out = net(list(xt[:, :, None]), 1 - t / 1000, texts).sample
        return -torch.stack(out)[:, :, 0]

    def first_half(self, net):
        return list(net.layers[:max(1, len(net.layers) // 2)])

    def feature_map(self, block, output):
        image = output[:, :(self.latent_shape[-1] // 2) ** 2]
        return super().feature_map(block, (None, image))

    def channels(self, net):
        return [net.config.dim] * len(self.first_half(net))

FAMILIES = dict(
    StableDiffusionXLPipeline=SDXL, StableDiffusion3Pipeline=SD3, QwenImagePipeline=QwenImage,
    ZImagePipeline=ZImage)

# --------------------------------------------------------------------------------------------------
# LoRA: a student or fake score that has the teacher's frozen tensors, not a copy of them, and
# adapters of its own. One set of base weights serves all networks, and no adapter is ever switched

def trained(net):
    """{name: parameter} of what net trains: all of it, the adapters, or the heads."""
    return {k: w for k, w in net.named_parameters() if w.requires_grad}

@torch.no_grad()
def load_trained(net, tensors):
    """Puts {name: whole tensor} into trained(net), of which a rank may have a share of the rows."""
    own = trained(net)
    odd = sorted(own.keys() ^ tensors.keys())
    odd = odd or [k for k in own if own[k].shape != tensors[k].shape]
    assert not odd, f'{len(odd)} tensors are missing, too many or of another shape: {odd[0]}...'
    for k, w in own.items():
        first, end = rows(w)
        local(w).copy_(tensors[k][first:end])

def twin(net, dtype=None):
    """A copy of net that shares its frozen parameters and its buffers. dtype, where the copy is not
    to be trained: that of its own linear layers and convolutions. Autocast to dtype would cast
    them at every use, so it changes no bit of what they compute."""
    shared = [w for w in net.parameters() if not w.requires_grad] + list(net.buffers())
    other = copy.deepcopy(net, {id(w): w for w in shared})
    for layer in other.modules() if dtype else ():
        own = all(w.requires_grad for w in layer.parameters())
        if own and isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.to(dtype)
    return other

@contextlib.contextmanager
def adapters_at(net, scale):
    """net's adapters count as scale B A inside, whatever alpha / rank is; 0: they do not count."""
    own = {layer: layer.scaling for layer in net.modules() if hasattr(layer, 'lora_A')}
    for layer in own:                  # a tensor: a graph of torch.compile then serves every scale
        layer.scaling = dict.fromkeys(layer.scaling, torch.tensor(scale))
    yield
    for layer, scaling in own.items():
        layer.scaling = scaling

ATTENTION = ['to_q', 'to_k', 'to_v', 'to_out.0',
             'add_q_proj', 'add_k_proj', 'add_v_proj', 'to_add_out']

def lora_config(net, rank, alpha, targets, flag='--lora'):
    """peft's LoraConfig for adapters B A alpha / rank on the modules of net whose names end in one
    of targets ('attention': the projections of all attention layers); None for rank 0."""
    from peft import LoraConfig
    if not rank:
        return None
    ends = ATTENTION if targets == 'attention' else [x.strip() for x in targets.split(',')]
    found = {name: layer for name, layer in net.named_modules()
             if any(f'.{name}'.endswith(f'.{end}') for end in ends)}
    way_out = "give the ends of modules' names, with commas, or attention"
    if not found:
        die(f'--lora_targets {targets}: the network has no such module; {way_out}')
    for name, layer in found.items():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            die(f'--lora_targets {targets}: {name} is no linear layer or convolution; {way_out}')
        size = tuple(layer.weight.shape[:2])
        if rank > min(size):
            die(f'{flag} {rank} is more than {name} has, {size}; choose at most {min(size)}')
    return LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=ends, init_lora_weights='gaussian')

# --------------------------------------------------------------------------------------------------
# discriminators

class Head(nn.Sequential):
    """One logit from one feature map, (B, channels, h, w) -> (B, 1): ADM's three [conv 4x4 stride
    2, GroupNorm 32, SiLU], one [conv 3x3, GroupNorm 32, SiLU], global average pool, linear."""

    def __init__(self, channels, width=256):
        layers = []
        for k in range(4):
            kernel = (4, 2, 1) if k < 3 else (3, 1, 1)                  # its size, stride, padding
            layers.append(nn.Conv2d(channels if k == 0 else width, width, *kernel))
            layers.append(nn.GroupNorm(32, width))
            layers.append(nn.SiLU())
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1))

    def forward(self, x):
        # three halvings need 8; only the bottlenecks of small models are smaller
        if min(x.shape[-2:]) < 8:
            x = F.interpolate(x, size=(8, 8))
        return super().forward(x)

SAM_URL = 'https://dl.fbaipublicfiles.com/segment_anything/sam_vit_'
SAM_FILES = dict(vit_b='b_01ec64.pth', vit_l='l_0b3195.pth', vit_h='h_4b8939.pth')

def build_sam_encoder(state):
    """segment_anything's ImageEncoderViT with the weights of a state dict: vit_b, vit_l, vit_h or
    any other size, all read off the tensors. KeyError, RuntimeError... where it is not one."""
    from segment_anything.modeling import ImageEncoderViT
    prefix = 'image_encoder.'
    state = {k.removeprefix(prefix): v.float() for k, v in state.items() if k.startswith(prefix)}
    grid, dim = state['pos_embed'].shape[2:]
    patch = state['patch_embed.proj.weight'].shape[-1]
    depth = len([k for k in state if k.endswith('attn.rel_pos_h')])
    # a block's relative positions tell the side of the window that it attends to
    sides = [(len(state[f'blocks.{i}.attn.rel_pos_h']) + 1) // 2 for i in range(depth)]
    encoder = ImageEncoderViT(
        img_size=grid * patch, patch_size=patch, embed_dim=dim, depth=depth,
        num_heads=dim // state['blocks.0.attn.rel_pos_h'].shape[1],
        mlp_ratio=len(state['blocks.0.mlp.lin1.weight']) / dim,
        out_chans=len(state['neck.0.weight']), use_rel_pos=True, window_size=min(sides),
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
        global_attn_indexes=[i for i, side in enumerate(sides) if side == grid])
    encoder.load_state_dict(state)
    return encoder.requires_grad_(False).eval()

def load_sam_encoder(name):
    """build_sam_encoder on a checkpoint file, or on vit_b, vit_l, vit_h (downloaded once)."""
    offline = '--sam assets/toy/sam.pth runs offline, --gan latent and --gan none need no SAM'
    if name not in SAM_FILES and not Path(name).exists():
        die(f'--sam {name} does not exist; give a segment_anything checkpoint, vit_b, vit_l or '
            f'vit_h ({offline})')
    with sentence(f'--sam {name} could not be downloaded, or is no plain state dict of tensors: '
                  f'truncated, or with pickled code; {offline}'):
        if name in SAM_FILES:
            state = torch.hub.load_state_dict_from_url(
                SAM_URL + SAM_FILES[name], map_location='cpu', weights_only=True)
        else:
            state = torch.load(name, map_location='cpu', weights_only=True)
    with sentence(f'--sam {name} is not a segment_anything checkpoint (image_encoder tensors '
                  f'missing or misshapen); {offline}'):
        return build_sam_encoder(state)

class PixelDiscriminator(nn.Module):
    """Frozen SAM image encoder, one trained Head on each of its global-attention blocks.

    forward: pixels (B, 3, H, W) in [-1, 1] -> logits (B, number of heads), differentiable in the
    pixels. A whole picture of `size` pixels is resized to the encoder's own input; a crop of one is
    resized by the same factor, and the position embedding with it, so that a crop costs what its
    area costs.
    """

    def __init__(self, encoder, size, checkpointing=False):
        super().__init__()
        self.encoder = encoder
        self.size = size
        self.checkpointing = checkpointing
        # the other blocks attend within windows
        self.blocks = [i for i, block in enumerate(encoder.blocks) if block.window_size == 0]
        dim = encoder.pos_embed.shape[-1]
        self.heads = nn.ModuleList(Head(dim) for _ in self.blocks)
        # SAM's statistics, of 0..255, for pixels in [-1, 1]
        mean = torch.tensor([123.675, 116.28, 103.53]) / 127.5 - 1
        std = torch.tensor([58.395, 57.12, 57.375]) / 127.5
        self.register_buffer('mean', mean.view(1, 3, 1, 1), persistent=False)
        self.register_buffer('std', std.view(1, 3, 1, 1), persistent=False)

    def features(self, x):
        """The global-attention blocks' outputs, a list of (B, dim, h, w)."""
        patch = self.encoder.patch_embed.proj.kernel_size[0]
        scale = self.encoder.img_size / self.size
        side = max(1, round(x.shape[-1] * scale / patch)) * patch
        x = F.interpolate(x, (side, side), mode='bilinear', antialias=True, align_corners=False)
        x = self.encoder.patch_embed((x - self.mean) / self.std)                   # (B, h, w, dim)
        pos = self.encoder.pos_embed.permute(0, 3, 1, 2)                           # (1, dim, h, w)
        if pos.shape[-2:] != x.shape[1:3]:
            pos = F.interpolate(pos, size=x.shape[1:3], mode='bicubic', align_corners=False)
        x = x + pos.permute(0, 2, 3, 1)
        found = []
        for i, block in enumerate(self.encoder.blocks[:self.blocks[-1] + 1]):
            if self.checkpointing and x.requires_grad:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
            if i in self.blocks:
                found.append(x.permute(0, 3, 1, 2))                                # (B, dim, h, w)
        return found

    def forward(self, x):
        logits = [head(f) for head, f in zip(self.heads, self.features(x))]
        return torch.cat(logits, 1)

# --------------------------------------------------------------------------------------------------
# the latent reward

class LatentReward(nn.Module):
    """LPO's latent reward model (LRM-XL, 2502.01051): how much noisy latents please their prompt,

        score = exp(logit_scale) cos(W v, e)

    e: the pooled projection of the second text encoder; v: the averages of base.features at (z, t),
    the last one guided with weight 7.5 against the encoded empty prompt. It has CLIP text encoders
    of its own and uses the base model's tokenizers, T5, latents and schedule.
    forward: z (B, C, h, w), t (B,), y = encode(prompts) -> (B,) fp32.
    """

    def __init__(self, base, net, text_encoder, text_encoder_2):
        super().__init__()
        self.base = base
        self.net = net
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2
        own = dict(text_encoder=text_encoder, text_encoder_2=text_encoder_2) | {base.part: net}
        self.pipe = type(base.pipe)(**base.pipe.components | own)
        for name in base.second_half:
            setattr(net, name, None)
        if hasattr(net, 'transformer_blocks'):
            net.transformer_blocks = nn.ModuleList(base.first_half(net))
        self.dim = text_encoder_2.config.projection_dim
        self.visual_projection = nn.Linear(sum(base.channels(net)), self.dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))                        # log(1 / .07)

    def encode(self, prompts):
        """B strings -> (embeddings (2 B, L, D), pooled (2 B, P)), the second half those of ''."""
        wanted = [*prompts, *[''] * len(prompts)]
        each = list(dict.fromkeys([*prompts, '']))                # candidates of a prompt share it
        y = self.base.encode_with(self.pipe, each)
        places = [each.index(prompt) for prompt in wanted]
        return [v[places] for v in y]

    def forward(self, z, t, y):
        maps = self.base.features(self.net, z.repeat(2, 1, 1, 1), t.repeat(2), y)
        *stages, middle = [f.mean((2, 3)) for f in maps]                                  # (2 B, C)
        cond, uncond = middle.chunk(2)
        stages = [f.chunk(2)[0] for f in stages]
        v = torch.cat(stages + [uncond + 7.5 * (cond - uncond)], 1)                   # (B, sum C)
        v = F.linear(v, self.visual_projection.weight.float())                           # (B, dim)
        e = y[1].chunk(2)[0][:, -self.dim:].float()                                       # (B, dim)
        return self.logit_scale.float().exp() * F.cosine_similarity(v, e)

def load_latent_reward(name, base):
    """LatentReward, frozen, from a folder in the layout of casiatao/LRM's SDXL model (unet/, of SD3
    transformer/, text_encoder/, text_encoder_2/, state_dict.pt) or hub_id/subfolder."""
    if not hasattr(base.pipe, 'text_encoder_2'):
        die(f'--reward latent: a latent reward scores by the second of two CLIP text encoders, '
            f'{base.name} has none; --reward pickscore reads pictures')
    folder = Path(name)
    way_out = (f'give --lrm a folder with {base.part}/, text_encoder/, text_encoder_2/ and '
               'state_dict.pt; for a base model that has none, train one as tests/make_toy.py '
               'does, or go on with train_stage1.py')
    repo, inside = '/'.join(folder.parts[:2]), folder.parts[2:]
    if not name or not folder.exists() and not hub_id(repo):
        die(f'--lrm {name} does not exist; {way_out}')
    dtype = base.teacher.dtype
    with sentence(f'--lrm {name} could not be loaded or downloaded; {way_out}'):
        if not folder.exists():
            from huggingface_hub import snapshot_download
            folder = Path(snapshot_download(repo, allow_patterns='/'.join([*inside, '*'])), *inside)
        net, info = type(base.teacher).from_pretrained(
            folder / base.part, dtype=dtype, output_loading_info=True)
        texts = [type(getattr(base.pipe, k)).from_pretrained(folder / k, dtype=dtype)
                 for k in ('text_encoder', 'text_encoder_2')]
        reward = LatentReward(base, net, *texts)
        # what the first half consists of must have been there
        lacking = sorted({*info['missing_keys']} & net.state_dict().keys())
        channels = net.config.in_channels
        if lacking:
            die(f'--lrm {name}: its {base.part} lacks {lacking[0]} and {len(lacking) - 1} more')
        if channels != base.latent_shape[0]:
            die(f'--lrm {name}: its {base.part} reads {channels} latent channels, --model '
                f'{base.name} has {base.latent_shape[0]}')
        state = torch.load(folder / 'state_dict.pt', map_location='cpu', weights_only=True)
        reward.visual_projection.load_state_dict(state['visual_projection'])
        reward.logit_scale.data = torch.as_tensor(state['logit_scale']).float()
    return reward.to(base.device).eval().requires_grad_(False)

# --------------------------------------------------------------------------------------------------
# sampling: the student's own sampler, and diffusers' pipelines for sample.py and evaluate.py

def at_step(base, steps, noise, k, x0):
    """The student's input (x_t, t) at its step k: the x0 of the step before, noised to it (None:
    pure noise). steps (S,), noise (B, S, C, h, w)."""
    t = steps[k].expand(len(noise))
    if x0 is None:
        return noise[:, k], t
    return base.schedule.noised(x0, noise[:, k], t), t

@torch.no_grad()
def backward_simulation(base, net, steps, noise, y, first=0, stop=None, x0=None, ode=False):
    """Runs the few-step student from step `first` up to, not including, `stop` (None: to the end).

    At each step the x0 of the step before is noised with fresh noise and predicted anew: DMD2's
    multi-step sampler. ode: with the noise that is in the input already. Returns x0 (B, C, h, w),
    or the x0 passed in where there is no step to run.
    """
    for k in range(len(steps))[first:stop]:
        x_t, t = at_step(base, steps, noise, k, x0)
        x0 = base.x0(net, x_t, t, y)
        if ode:
            left = (x_t - base.schedule.alpha(t) * x0) / base.schedule.sigma(t)
            noise = left[:, None].expand_as(noise)
    return x0

def reach(base, net, steps, noise, y, s):
    """The student's input (x_s, t_s) at its step s, reached from pure noise as at inference."""
    before = backward_simulation(base, net, steps, noise, y, stop=s)
    return at_step(base, steps, noise, s, before)

def reach_dmdr(base, net, steps, noise, y, s, rollout, eps):
    """DMDR's (x_s, t_s) and the sample that is noised to t_s with eps: of --rollout sde the
    student's x0 at step s itself, of ode the end of its deterministic trajectory. At the first
    step x_s is pure noise."""
    ode = rollout == 'ode'
    stop = None if ode else s + 1
    sample = backward_simulation(base, net, steps, noise, y, stop=stop, ode=ode)
    t_s = steps[s].expand(len(eps))
    return base.schedule.noised(sample, eps, t_s) if s else eps, t_s, sample

def student_pictures(base, net, steps, prompts, noise, micro):
    """The student's pictures by backward_simulation, `micro` at a time: noise (B, S, C, h, w) ->
    (B, 3, H, W). Every rank calls it, as the student may be sharded."""
    found = []
    for k in range(0, len(prompts), micro):
        j = slice(k, k + micro)
        z = backward_simulation(base, net, steps, noise[j], base.encode(prompts[j]))
        found.append(base.pictures(z))
    return torch.cat(found)

def few_step_scheduler(scheduler, tokens=4096):
    """The diffusers scheduler whose sampling is backward_simulation's, of n steps: LCM's, of a
    flow with sigmas = (n, ..., 1) / n in the pipeline's call, which it shifts by itself. Of the
    base's own it takes the noise levels, and none of the other settings: clipping, thresholding,
    spacing. tokens: as for Schedule."""
    from diffusers import FlowMatchLCMScheduler, LCMScheduler
    schedule = Schedule(scheduler, tokens)
    if schedule.kind == 'flow':
        return FlowMatchLCMScheduler(shift=schedule.shift)
    names = 'beta_start', 'beta_end', 'beta_schedule', 'trained_betas', 'rescale_betas_zero_snr'
    levels = {name: scheduler.config[name] for name in names if name in scheduler.config}
    if levels['beta_schedule'] not in ('linear', 'scaled_linear', 'squaredcos_cap_v2'):
        levels = dict(trained_betas=scheduler.betas.tolist())         # LCM's cannot compute others
    # from all 1000 it takes Schedule.steps, of 38 and 69 other numbers some 1 off; from its own
    # 50 it would take others
    return LCMScheduler(**levels, prediction_type=schedule.kind, original_inference_steps=1000)

def network_of(pipe):
    """The denoising network of a pipeline."""
    return pipe.transformer if hasattr(pipe, 'transformer') else pipe.unet

def check_compiles(net):
    """Ends with a sentence for a network that torch.compile does not take."""
    if type(net).__name__ == 'ZImageTransformer2DModel':
        die("--compile: Z-Image's network takes a list of texts, each as long as it is, of which "
            'torch.compile would make a graph for each set of lengths; leave it away')

def compile_pipeline(pipe):
    """torch.compile for a pipeline's network, for every size of batch, and its VAE's decoder."""
    check_compiles(network_of(pipe))
    network_of(pipe).compile(fullgraph=True, dynamic=False)
    pipe.vae.decoder.compile(fullgraph=True, dynamic=False)

@torch.no_grad()
def generate(pipe, prompts, indices, seed, steps, cfg):
    """Pictures (B, 3, H, W) in [0, 1], float32 on the CPU, one for each prompt. The noise of a
    picture depends on (seed, its index) alone, not on the batch. A student's pipeline takes `steps`
    evenly spaced steps, any other its scheduler's own; cfg: its guidance, 0 for a student. Pictures
    are decoded one by one: at 1024 px each takes 3.2 GB (tests/bench.py)."""
    pipe.vae.enable_slicing()
    streams = [generator(seed, int(i)) for i in indices]
    kind = type(pipe.scheduler)
    # Euler's with fresh noise is the same sampler, of students up to November 2026
    fresh = 'FlowMatchLCM' in kind.__name__ or pipe.scheduler.config.get('stochastic_sampling')
    how = family_of(pipe).called(pipe, cfg, len(streams))
    if kind.__name__ == 'LCMScheduler':
        how['timesteps'] = Schedule(pipe.scheduler).steps(steps).long().tolist()
    elif fresh:
        how['sigmas'] = [k / steps for k in range(steps, 0, -1)]
        # flows' pipelines do not hand their generators on to the scheduler
        pipe.scheduler.step = functools.partial(kind.step, pipe.scheduler, generator=streams)
    else:
        how['num_inference_steps'] = steps
    out = pipe(list(prompts), generator=streams, output_type='pt', **how)
    return out.images.float().cpu()

# --------------------------------------------------------------------------------------------------
# a student on disk: a pipeline that diffusers alone can use, or the adapters of a LoRA student

def on_cpu(net, dtype):
    """A frozen copy of net in main memory, floating weights as dtype, without a second copy on
    net's own device."""
    copies = {id(w): nn.Parameter(w.detach().to('cpu', dtype), False) for w in net.parameters()}
    for b in net.buffers():
        copies[id(b)] = b.detach().to('cpu', dtype if b.is_floating_point() else b.dtype)
    return copy.deepcopy(net, copies).eval()

@torch.no_grad()
def whole_on_rank_0(tensors, dtype):
    """{name: tensor} in main memory, floating ones as dtype, gathered one by one where they are
    sharded. Every rank calls it, rank 0 has the result, the others {}."""
    found = {}
    for name, w in tensors.items():
        w = w.detach().to(dtype) if w.is_floating_point() else w
        w = w.full_tensor() if isinstance(w, DTensor) else w
        if dist.get_rank() == 0:
            found[name] = w.cpu()
    return found

# the LoRA of an SDXL student under kohya's names, which ComfyUI and A1111 read
COMFYUI = 'comfyui.safetensors'
BASE_LORA = 'base_lora.safetensors'                  # what was merged into its teacher, --base_lora
# base models whose licence is known, as model cards on the hub write it
LICENCES = {'stabilityai/stable-diffusion-xl-': 'openrail++',
            'stabilityai/stable-diffusion-3': 'other', 'Qwen/Qwen-Image': 'apache-2.0',
            'Tongyi-MAI/Z-Image': 'apache-2.0'}

@functools.cache
def commit():
    """The commit of this repository, with a + where its files were edited; '' outside of git."""
    git = ['git', '-C', str(Path(__file__).resolve().parent)]
    words = ['describe', '--always', '--abbrev=40', '--exclude=*', '--dirty=+']
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.check_output(
            git + words, text=True, stderr=subprocess.DEVNULL, timeout=20).strip()
    return ''

def versions():
    """What a result depends on beside its settings: this commit and the libraries' versions."""
    names = 'torch', 'diffusers', 'transformers', 'peft'
    return dict(commit=commit(), versions={k: importlib.metadata.version(k) for k in names})

def modelspec(facts, family):
    """A safetensors file's metadata, by which other tools know what it is for."""
    kind = family.architecture + ('/lora' if facts.get('lora') else '')
    words = {
        'sai_model_spec': '1.0.0', 'architecture': kind,
        'implementation': 'diffusers', 'title': f'Flash-DMD student of {facts["base_model"]}',
        'description': f'{len(facts["steps"])} steps, no guidance (CFG 1), sampler LCM',
        'date': time.strftime('%Y-%m-%d')}
    return {'format': 'pt'} | {f'modelspec.{key}': value for key, value in words.items()}

def snippet(facts, family):
    """Lines of Python that draw with the student, started in its folder."""
    base, lora, steps = facts['base_model'], facts.get('lora'), len(facts['steps'])
    call, more, scheduler = f'num_inference_steps={steps}', '', 'LCMScheduler'
    if family.part == 'transformer':
        scheduler = 'FlowMatchLCMScheduler'
        call = f'sigmas={[k / steps for k in range(steps, 0, -1)]}'
        if facts.get('t5') is False:
            more = ', text_encoder_3=None, tokenizer_3=None'
            call += ', max_sequence_length=77'
    names = f'DiffusionPipeline, {scheduler}' if lora else 'DiffusionPipeline'
    lines = [
        'import torch', f'from diffusers import {names}',
        "student = '.'                                   # this folder, or its name on the hub",
        'cuda = torch.cuda.is_available()', f'dtype = {family.half} if cuda else torch.float32',
        f'pipe = DiffusionPipeline.from_pretrained({repr(base) if lora else "student"}, '
        f'dtype=dtype{more})']
    if lora and facts.get('base_lora'):
        lines.append(f"pipe.load_lora_weights(student, weight_name='{BASE_LORA}')")
        lines.append(f'pipe.fuse_lora(lora_scale={facts["base_lora"][1]})')
        lines.append('pipe.unload_lora_weights()')
    if lora:
        lines.append('pipe.load_lora_weights(student)')
        lines.append(f"pipe.scheduler = {scheduler}.from_pretrained(student, "
                     "subfolder='scheduler')")
    lines.append("pipe.to('cuda' if cuda else 'cpu')")
    lines.append(f'prompt = {facts["prompts"][0]!r}')
    lines.append(f"pipe(prompt, {call}, {family.unguided}).images[0].save('picture.png')")
    return lines

def write_facts(folder, facts, family, run):
    """student.json, the base LoRA and the model card of the student in `folder`, and beside it the
    newest pictures and the settings of its run, if `run` is the folder of one."""
    from huggingface_hub import ModelCardData
    if facts.get('base_lora'):                     # the student's folder is to be whole without it
        file, weight, _ = lora_and_weight(facts['base_lora'])
        if Path(file) != folder / BASE_LORA:
            shutil.copyfile(file, folder / BASE_LORA)
        facts = facts | dict(base_lora=[BASE_LORA, weight])
    (folder / 'student.json').write_text(json.dumps(facts, indent=1))
    base, lora, steps = facts['base_model'], facts.get('lora'), len(facts['steps'])
    licence = next((words for name, words in LICENCES.items() if base.startswith(name)), None)
    head = ModelCardData(
        library_name='diffusers', pipeline_tag='text-to-image', license=licence,
        tags=['text-to-image', 'distillation'] + (['lora'] if lora else []))
    if licence == 'other':
        head.license_name = 'stabilityai-ai-community'
        head.license_link = f'https://huggingface.co/{base}/blob/main/LICENSE.md'
    if hub_id(base) and not Path(base).exists():
        head.base_model = base
        head.base_model_relation = 'adapter' if lora else 'finetune'
    times = ', '.join(map(str, facts['steps']))
    text = ['---', head.to_yaml(), '---', '', f'# {steps}-step student of {base}', '',
            f'Distilled by Flash-DMD, in the open: recipe {facts["recipe"]}, iteration '
            f'{facts["iteration"]}. It draws in {steps} steps, at t = {times}, without guidance.']
    grids = sorted(run.glob('samples-*.png'))
    if grids:
        shutil.copyfile(grids[-1], folder / 'samples.png')
        text += ['', '![pictures of the run](samples.png)']
    text += ['', '```python', *snippet(facts, family), '```']
    if lora and family.part == 'unet':
        text += ['', f'ComfyUI, A1111: `{COMFYUI}` is the LoRA under their names, for strength 1; '
                 f'sampler LCM, scheduler simple, {steps} steps, CFG 1.']
    if facts.get('base_lora'):
        what = 'was merged into its base model first, and belongs beneath it' if lora else (
            'was merged into its teacher; it is in these weights')
        text += ['', f'`{BASE_LORA}`, at strength {facts["base_lora"][1]:g}, {what}.']
    text += ['', "Licence: the base model's" + (
        '.' if licence else ', which is not known here; add it before you publish.')]
    if commit():
        text += ['', f'Written by commit {commit()}.']
    if (run / 'args.json').exists():
        settings = json.loads((run / 'args.json').read_text())
        # where things lie on this machine is nobody's business
        settings = {k: v for k, v in settings.items() if str(v).strip("['")[:1] not in ('/', '~')}
        text += ['', 'Settings of the run:', '', '```json', json.dumps(settings, indent=1), '```']
    (folder / 'README.md').write_text('\n'.join(text) + '\n')

def save_student(folder, base, student, steps, dtype, facts, lora=None):
    """Saves the student with a scheduler of its own: a pipeline folder, or of a LoRA student (lora:
    its LoraConfig) the adapters. dtype: of all weights, by name. student.json has facts (base
    model, recipe, iteration, prompts) and the steps. Every rank calls it, rank 0 writes."""
    dtype = getattr(torch, dtype)
    if lora:
        tensors = whole_on_rank_0(trained(student), torch.float32)
    else:
        tensors = whole_on_rank_0(student.state_dict(), dtype)
    if dist.get_rank():
        return
    from diffusers.utils import convert_state_dict_to_kohya
    scheduler = few_step_scheduler(base.pipe.scheduler, base.tokens)
    facts = facts | dict(steps=steps.long().tolist())
    with replacing(folder) as tmp:
        if lora:
            tmp.mkdir()
            scale = lora.lora_alpha / lora.r
            adapters = {}
            for name, w in tensors.items():
                # alpha / rank goes into the second factor: at scale 1, whatever a loader does
                w = w * (scale if 'lora_B' in name else 1)
                name = f'{base.part}.{name.replace(".default", "")}'
                adapters[name] = w.to(dtype).contiguous()
            facts['lora'] = dict(
                rank=lora.r, alpha=lora.lora_alpha, targets=sorted(lora.target_modules))
            words = modelspec(facts, base)
            save_file(adapters, tmp / 'pytorch_lora_weights.safetensors', words)
            if base.part == 'unet':                     # of SD3 they read diffusers' own names
                names = convert_state_dict_to_kohya(adapters)
                save_file({k: w.contiguous() for k, w in names.items()}, tmp / COMFYUI, words)
            scheduler.save_pretrained(tmp / 'scheduler')
        else:
            with torch.device('meta'):
                network = base.network.from_config(student.config)
            network.load_state_dict(tensors, assign=True)
            parts = {name: on_cpu(part, dtype) if isinstance(part, nn.Module) else part
                     for name, part in base.pipe.components.items() if name != base.part}
            parts |= {base.part: network, 'scheduler': scheduler}
            parts |= {name: value for name, value in base.pipe.config.items()
                      if name == 'force_zeros_for_empty_prompt'}
            type(base.pipe)(**parts).save_pretrained(tmp)
        if base.base_lora:
            (tmp / BASE_LORA).write_bytes(base.base_lora_bytes)
            facts['base_lora'] = [tmp / BASE_LORA, *base.base_lora[1:]]
        write_facts(tmp, facts, type(base), Path(folder).parent)

def lora_file(folder, net, flag):
    """The adapters in a LoRA student's folder, {name in trained(net): tensor}, at scale 1."""
    file = Path(folder) / 'pytorch_lora_weights.safetensors'
    with sentence(f'{flag} {file} is missing, truncated or not a LoRA file'):
        # names begin with unet. or transformer.
        tensors = {k.split('.', 1)[1]: v for k, v in load_file(file).items()}
    layers = dict(net.named_modules())
    for k, v in tensors.items():
        name, _, factor = k.removesuffix('.weight').rpartition('.lora_')
        dim = 1 if factor == 'A' else 0
        if name not in layers or v.shape[dim] != layers[name].weight.shape[dim]:
            die(f'{flag} {file} is of another base model: its {k}, {tuple(v.shape)}, does not fit')
    return tensors

def restore_student(base, net, folder, lora):
    """Puts the weights that save_student wrote into net, of base.trainable(lora)."""
    with sentence(f'--init {folder} is damaged, or no student of this --model and these '
                  '--lora_targets; leave both away, or choose another --init'):
        if lora is None:
            saved = base.network.from_pretrained(folder, subfolder=base.part, dtype=torch.float32)
            own = trained(net)
            load_trained(net, {k: w for k, w in saved.named_parameters() if k in own})
            return
        adapters = {}
        for name, w in lora_file(folder, net, '--init').items():
            scale = lora.lora_alpha / lora.r if 'lora_B' in name else 1
            adapters[name.replace('.weight', '.default.weight')] = w.float() / scale
        load_trained(net, adapters)

def load_student(folder, facts, dtype=None):
    """A student's pipeline with its scheduler: the saved one, or its base model with adapters."""
    if not facts.get('lora'):
        return load_pipeline(folder, '--ckpt', dtype)
    whose = f'--ckpt {folder}: its base model'
    pipe = load_pipeline(
        facts['base_model'], whose, dtype, facts.get('t5'), facts.get('base_lora'))
    lora_file(folder, network_of(pipe), '--ckpt')                                # for its sentence
    pipe.load_lora_weights(folder)
    tokens = (family_of(pipe).side(pipe) // 2) ** 2
    pipe.scheduler = few_step_scheduler(pipe.scheduler, tokens)
    return pipe

def find_student(ckpt, flag='--ckpt', runs='out/stage[12]*'):
    """The folder of a student and its facts (student.json): `ckpt` is a run's folder or the
    student's own; empty means the newest of the pattern `runs`, else the shipped one."""
    files = Path().glob(f'{runs}/student/student.json')
    files = sorted(files, key=lambda f: f.stat().st_mtime, reverse=True)
    places = [f.parent for f in files] + [Path(os.path.relpath(HERE), 'assets/toy/student')]
    if ckpt:
        places = [Path(ckpt) / 'student', Path(ckpt), HERE / ckpt]
    folder = next((place for place in places if (place / 'student.json').exists()), None)
    if folder is None:
        die(f'{flag} {ckpt} holds no student (no student.json); give the folder of a training run')
    with sentence(f'{flag} {folder} is damaged: its student.json cannot be read, or lacks what '
                  'train_stage1.py writes there'):
        facts = json.loads((folder / 'student.json').read_text())
        kinds = dict(base_model=str, recipe=str, iteration=int, steps=list, prompts=list)
        for key, kind in kinds.items():
            assert isinstance(facts[key], kind) and facts[key] not in ('', []), key
        if facts.get('lora'):
            assert facts['lora']['rank'] > 0 and facts['lora']['alpha'] > 0
        if facts.get('base_lora'):
            file, weight = facts['base_lora']
            facts['base_lora'] = [str(folder / file), float(weight)]
    home = HERE / facts['base_model']
    if home.exists() and not Path(facts['base_model']).exists():         # from another folder
        facts['base_model'] = str(home)
    return folder, facts

# ==================================================================================================
# PLUMBING: what two scripts need in order to run, and nothing that decides what is learnt
# ==================================================================================================

# --------------------------------------------------------------------------------------------------
# files

@contextlib.contextmanager
def replacing(path):
    """Yields a temporary path beside `path`, a file or a folder; on success it takes path's place
    in one rename, on any error what stood there stays. What is written reaches the disk before the
    name does, so a power cut leaves no empty file."""
    path = Path(path)
    temporary = path.with_name(f'{path.name}.tmp{path.suffix}')
    remove(temporary)
    try:
        yield temporary
        flush(*temporary.rglob('*'), temporary)
        if path.is_dir():                    # a folder cannot be renamed onto one that is not empty
            old = path.with_name(path.name + '.old')
            remove(old)
            os.replace(path, old)
            os.replace(temporary, path)
            remove(old)
        else:
            os.replace(temporary, path)
        flush(path.parent)
    finally:
        remove(temporary)

def remove(path):
    """Deletes a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

def flush(*paths):
    """Sees to it that files and folders are on the disk, files with the mode that the umask gives
    any other: safetensors' own are for nobody but their owner."""
    mask = os.umask(0o077)
    os.umask(mask)
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        if path.is_file():
            os.fchmod(handle, 0o666 & ~mask)
        os.fsync(handle)
        os.close(handle)

def writable_folder(path, flag):
    """Makes the folder `path`; ends with a sentence that names the flag when it is not writable."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        die(f'{flag} {path} cannot be written ({error.strerror}); choose another folder')
    return path

def hold(out):
    """Takes the folder of a run for this one, as long as the process lives; ends with a sentence
    where another has it. Returns rank 0's open lock file, which is to be kept."""
    lock, other = None, ''
    for _ in range(25 if dist.get_rank() == 0 else 0):     # who was killed may take seconds to go
        lock = (out / '.lock').open('a+')
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            other = ''
            lock.truncate(0)
            lock.write(f'process {os.getpid()} on {socket.gethostname()}')
            lock.flush()
            break
        except (BlockingIOError, PermissionError):
            lock.seek(0)
            other = lock.read() or 'just begun'
            time.sleep(.2)
        except OSError:                                         # a file system that has no locks
            break
    other = gathered(other)[0]
    if other:
        die(f'--out {out} is in use by another run, {other}; wait for its end, or choose another '
            '--out')
    return lock

def clear_check(out):
    """Empties the folder of a --check that was killed; ends with a sentence where something else is
    in it."""
    found = [*out.glob('[!.]*')] if dist.get_rank() == 0 else []
    own = not found
    with contextlib.suppress(*BAD_FILE):
        own = own or json.loads((out / 'args.json').read_text())['check']
    if not gathered(own)[0]:
        die(f'--check works in {out}, which has files that no check wrote; choose another --out')
    for left in found:
        remove(left)

def default_out(stage, recipe):
    """--out where none is given: out/stage1, or with --recipe out/stage1-RECIPE."""
    return '-'.join(filter(None, [f'out/stage{stage}', recipe]))

def read_prompts(path, flag='--prompts', blank=False):
    """The lines of a text file, which end at \\n or \\r\\n alone; blank ones, as '', only where
    their numbers count."""
    with sentence(f'{flag} {path} cannot be read as text; give a file with one prompt per line'):
        lines = Path(path).read_bytes().decode('utf-8-sig').removesuffix('\n').split('\n')
    prompts = [line.strip() for line in lines if blank or line.strip()]
    if not any(prompts):
        die(f'{flag} {path} has no prompt in it; give a file with one prompt per line')
    return prompts

def quiet():
    """No warnings, retry reports and progress bars from the Hugging Face libraries, but for those
    of downloads, on one rank; their errors become sentences."""
    import diffusers
    import huggingface_hub
    import transformers
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
    if os.environ.get('LOCAL_RANK', '0') == '0':
        huggingface_hub.utils.enable_progress_bars()               # transformers' turned them off
    # torch.compile's, of diffusers' own code
    warnings.filterwarnings('ignore', message='.*lru_cache')

# --------------------------------------------------------------------------------------------------
# ranks. A lone process is a group of one, so nothing below asks how many there are

def launch(minutes):
    """Joins the ranks that torchrun started: (rank, number of ranks, device). minutes: how long a
    collective waits for the others."""
    names = dict(RANK=0, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1, WORLD_SIZE=1)
    rank, local, here, world = (int(os.environ.get(name, least)) for name, least in names.items())
    device, backend = torch.device('cpu'), 'gloo'
    if torch.cuda.is_available():
        cards = torch.cuda.device_count()
        if max(here, local + 1) > cards:
            die(f'--nproc_per_node: {here} ranks on this machine, which has {cards} CUDA devices; '
                'each rank needs its own')
        device, backend = torch.device('cuda', local), 'cpu:gloo,cuda:nccl'
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')
    if 'TORCHELASTIC_RUN_ID' in os.environ and sys.platform == 'linux':
        # PR_SET_PDEATHSIG: a rank without its torchrun would go on saving into the folder of the
        # run that is started in its place
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    patience = timedelta(minutes=minutes)
    store = dist.HashStore()
    if world > 1:
        # torchrun's --max-restarts keeps the store, with the addresses of those who died in it
        store, *_ = next(dist.rendezvous('env://', timeout=patience))
        store = dist.PrefixStore(f'life {os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}', store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
    sys.excepthook = last_words                # after torch.distributed has set its own
    return rank, world, device

def last_words(kind, error, trace):
    """sys.excepthook: Ctrl-C, another rank's end, a full disk or card and lost data are known
    ends, and a sentence; of a full card, behind where it was. At a normal exit the process group
    would wait for those who are gone."""
    if isinstance(error, KeyboardInterrupt):
        print('\ntold to stop; what was saved is whole, and the same command goes on from there, '
              'or begins anew', flush=True)
        os._exit(130)
    if isinstance(error, Unreadable):
        words = str(error)
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        words = (f'{error.filename or "--out"}: {error.strerror}, by the disk, a quota or the '
                 'number of files; make room there and run again')
    elif isinstance(error, torch.OutOfMemoryError):
        sys.__excepthook__(kind, error, trace)
        words = ('the card is full; in training a smaller --micro, --gan_crop 512, --offload, '
                 '--lora 64 or more ranks take less')
    elif isinstance(error, dist.DistError) or 'gloo' in str(error):
        words = ('another rank is lost, and its own last words say why; run again to go on from '
                 'the last save, if there is one')
    else:
        return sys.__excepthook__(kind, error, trace)
    rank = f'rank {dist.get_rank()}: ' if dist.is_initialized() else ''
    print(f'error: {rank}{words}', file=sys.stderr, flush=True)
    os._exit(2)

def hear():
    """From here on Ctrl-C and SIGTERM do not end the process, but put an entry into the list that
    is returned. A second Ctrl-C does, but not torchrun's repetition of the first to its ranks."""
    told = []

    def note(number, frame):
        if not told:
            told.append(time.time())
            if dist.get_rank() == 0:                   # not by print(), which may be at work itself
                os.write(1, b'told to stop: the iteration is finished and saved; Ctrl-C once more '
                            b'ends at once\n')
        elif number == signal.SIGINT and time.time() > told[0] + 3:
            os.write(2, b'error: ended at once; the last save stays\n')
            os._exit(130)

    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, note)
    return told

def leave():
    """Ends the process, and well. Not by a usual exit: what is left of the group in sharded
    networks has threads that ask for Python when it is gone, and abort one exit in ten."""
    if 'wandb' in sys.modules:
        sys.modules['wandb'].finish()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

def gathered(value):
    """The list of every rank's value, any object that can be pickled; ranks meet here."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values

def print0(words):
    """print() on rank 0 alone, at once."""
    if os.environ.get('RANK', '0') == '0':
        print(words, flush=True)

# layers whose weights are gathered together, by the names of their classes in diffusers
BLOCKS = ('BasicTransformerBlock', 'ResnetBlock2D', 'JointTransformerBlock',
          'QwenImageTransformerBlock', 'ZImageTransformerBlock')

@functools.lru_cache(1)
def mesh_of(group, kind, world, here):
    """The ranks as FSDP2 takes them, one mesh for all networks of a group, since each of two
    dimensions has groups of its own: all ranks, or machines by the ranks of each."""
    if 1 < here < world:
        return init_device_mesh(
            kind, (world // here, here), mesh_dim_names=('replicate', 'shard'))
    return init_device_mesh(kind, (world,))

def parallel(net, device, shard=False, cpu_offload=False, compiled=False):
    """net as the loop calls it, on its device. None stays None.

    DDP: every rank has all of its weights, and gradients are averaged. shard, for a network that is
    trained or frozen as a whole: FSDP2. Every rank has a share of each weight, its gradient and
    moments; a layer's weights are gathered, in bf16 on CUDA, for its forward and again for its
    backward, which ends in the share of the mean gradient, fp32. Between machines shares are
    repeated. Either way gradients are exchanged in every backward. cpu_offload: shares, gradients
    and moments of what is trained wait in main memory. compiled: torch.compile.
    """
    if net is None:
        return None
    if compiled:
        check_compiles(net)
    world, here = dist.get_world_size(), int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    frozen = not trained(net)
    if not shard or frozen and world == 1:
        net.to(device)
        if compiled:
            net.compile(fullgraph=True, dynamic=False)
        if frozen:
            return net
        warnings.filterwarnings('ignore', message='.*broadcast_buffers')     # torch 2.14's, of DDP
        return DDP(net, device_ids=[device.index] if device.type == 'cuda' else None,
                   broadcast_buffers=False, gradient_as_bucket_view=True)

    # no input is cast: bf16 would make of the time 999 1000, autocast knows what to cast. The root,
    # too, gives its weights back: outside of a forward they are the shares, to be updated and saved
    how = dict(
        mesh=mesh_of(dist.group.WORLD, device.type, world, here), reshard_after_forward=True,
        mp_policy=MixedPrecisionPolicy(
            torch.bfloat16 if device.type == 'cuda' else torch.float32, torch.float32,
            cast_forward_inputs=False))
    if cpu_offload and not frozen:
        how['offload_policy'] = CPUOffloadPolicy(pin_memory=device.type == 'cuda')
    for block in [layer for layer in net.modules() if type(layer).__name__ in BLOCKS]:
        if compiled:                   # hooks, which gather, are no part of a graph: layer by layer
            torch._dynamo.config.recompile_limit = 256         # a class's layers share their code
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
        fully_shard(block, **how)
    fully_shard(net, **how)
    if frozen:                         # its list of what ran grows until a backward that never is
        net.register_forward_hook(lambda *_: net.reset_iter_state())
    return net

def local(w):
    """This rank's share of a weight or moment: all of it where it is not sharded."""
    return w.to_local() if isinstance(w, DTensor) else w

def rows(w):
    """(first, past the last) of the rows of a weight that this rank has, by its first dimension."""
    if not isinstance(w, DTensor):
        return 0, w.shape[0] if w.ndim else 1
    each = -(-w.shape[0] // w.device_mesh.shape[-1])
    first = min(each * w.device_mesh.get_coordinate()[-1], w.shape[0])
    return first, first + len(w.to_local())

@torch.no_grad()
def frozen_copy(base, net, compiled=False):
    """A frozen copy of net, as it is now, in the teacher's dtype; it shares net's frozen weights,
    and is sharded where net is."""
    sharded = any(isinstance(w, DTensor) for w in net.parameters())
    copied = base.trainable().to(base.teacher.dtype) if sharded else twin(net, base.teacher.dtype)
    parallel(copied.requires_grad_(False), base.device, sharded, compiled=compiled)
    for w, own in zip(copied.parameters(), net.parameters()) if sharded else ():
        local(w).copy_(local(own))
    return copied

def check_alike(it, weights):
    """Ends the run where ranks hold different weights, by the sum of each network's bits. Of
    sharded weights there is one of each. weights: {network: {name: fp32 tensor}}."""
    sums = {}
    for name, tensors in weights.items():
        bits = [w.detach().view(torch.int32).sum(dtype=torch.int64) for w in tensors.values()
                if not isinstance(w, DTensor)]
        sums[name] = int(sum(bits))
    for rank, other in enumerate(gathered(sums)):
        names = [name for name in sums if other[name] != sums[name]]
        if names:
            die(f'at iteration {it} the weights of {", ".join(names)} on rank {rank} differ from '
                f'those on rank {dist.get_rank()}, a bug or a faulty device; nothing of this '
                'iteration was saved')

def update(opt, net):
    """Clips net's gradients to norm 1, steps and returns the norm before; a non-finite gradient is
    dropped instead (None), and as gradients are averaged over ranks, on every rank alike."""
    norm = nn.utils.clip_grad_norm_(net.parameters(), 1.)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    sound = torch.isfinite(norm)
    if sound:
        opt.step()
    opt.zero_grad(set_to_none=True)
    return norm if sound else None

# --------------------------------------------------------------------------------------------------
# the plan of a run: what it will hold, computed before anything is fetched or built

# of the published models: parameters of the network, the text encoders (texts: without a T5), and
# for each rank of adapters on all attention; then GB of a student update at 1024 px, each sample:
# what its two passes keep, with and without gradient checkpointing, and what their backward adds
SIZES = dict(
    sdxl=dict(net=2.567e9, texts=.818e9, t5=0., adapters=1.4515e6, kept=(1.18, 13.8), back=.1),
    sd3=dict(net=2.028e9, texts=.818e9, t5=4.762e9, adapters=.5868e6, kept=(.74, 7.95), back=.3),
    qwen=dict(net=20.43e9, texts=8.292e9, t5=0., adapters=2.943e6, kept=(3.19, 52.3), back=.76,
              vae=.1269e9, picture=(14.1, 33.7), look=2.83),
    zimage=dict(net=6.155e9, texts=4.022e9, t5=0., adapters=1.0445e6, kept=(2.14, 64.4), back=1.25))
# parameters of the VAE, of SAM's vit_b and its heads; GB of each picture of 1024 px from the latent
# to the logits and back, with and without checkpointing, and to decode one to look at; GB of layers
# in flight, gathered, with their gradients. tests/bench.py --only memory counts all of these
VAE, SAM, HEADS, PICTURE, LOOK, FLIGHT = .0837e9, .0897e9, .0233e9, (13.1, 30.7), 3.3, .7

def stored(folder):
    """{part: parameters} of a pipeline folder, by the headers of its safetensors files."""
    found = Counter()
    files = {*Path(folder).glob('*/*.safetensors')}
    for file in files:
        if file.with_name(file.name.replace('.fp16.', '.')) in files - {file}:
            continue                                            # the same weights a second time
        with contextlib.suppress(*BAD_FILE), safe_open(file, 'pt') as f:    # loading it says more
            sizes = [math.prod(f.get_slice(key).get_shape()) for key in f.keys()]
            found[file.parent.name] += sum(sizes)
    return found

def gigabytes(args, world, here, cuda):
    """{'frozen', 'trained', 'activations': GB on each of `world` cards, `here` of them on this
    machine, 'main': GB of main memory that --cpu_offload takes, 'state', 'student': GB on the disk,
    'counted': whether activations are known}, for a training script's settings."""
    family = FAMILIES.get(class_of(args.model))                # unknown where nothing is fetched
    family = family.recipe if family else next((k for k in SIZES if k in args.recipe), 'sdxl')
    size = SimpleNamespace(**dict(vae=VAE, picture=PICTURE, look=LOOK) | SIZES[family])
    net, texts, vae = size.net, size.texts + (size.t5 if args.t5 is not False else 0), size.vae
    counted = True
    if Path(args.model).is_dir():
        parts = stored(args.model)
        net = parts['unet'] + parts['transformer']
        texts = sum(n for part, n in parts.items() if part.startswith('text_encoder'))
        vae = parts['vae']
        counted = abs(net / size.net - 1) < .1
    per_rank = size.adapters * net / size.net
    own = args.lora * per_rank or net
    fake = (args.fake_lora or args.lora) * per_rank or net
    spread = here if 1 < here < world else world
    few = 2 if cuda else 4                                # bytes of a frozen weight; VAE, SAM: 4
    sam, heads = (SAM, HEADS) if args.gan == 'pixel' and counted else (0, 0)

    # the teacher, whole where adapters are on it; stage 2's reference, a LoRA's has its tensors
    teachers = few * net / (spread if fake == net else 1)
    if own == net and hasattr(args, 'rl_ratio'):
        teachers += few * net / spread
    frozen = teachers + 4 * (vae + sam) + (0 if args.offload else few * texts)
    # weights, gradients and two moments, fp32; preference updates have moments of their own
    rl = hasattr(args, 'rl_ratio') and not (args.rl == 'refl' and args.joint)
    rl_moments = 8 * own if rl else 0
    taken = [(own, 16 * own + rl_moments), (fake, 16 * fake)]
    main = sum(x for w, x in taken if w == net) / spread
    trained = sum(x for w, x in taken if w != net)
    if not args.cpu_offload:
        trained, main = trained + main, 0
    if not args.lora and counted:                   # layers in flight, or autocast's bf16 copy
        trained += FLIGHT * 1e9 if world > 1 or args.cpu_offload else 2 * net * cuda
    trained += 16 * heads
    if hasattr(args, 'rl_ratio') and counted:
        frozen += few * 2.05e9 if 'latent' in args.reward else 3.9e9
    activations = 0
    if counted:
        dear = 0 if args.grad_checkpointing else 1
        kept = size.kept[dear]
        area = (args.gan_crop / 1024) ** 2 if args.gan_crop else 1
        judged = kept + size.picture[dear] * area * (args.gan == 'pixel')
        each = max(judged, kept + size.back)
        # of a network trained whole the gradients of one pass wait for the other's, in bf16
        learnt = .9 * args.micro + (0 if args.lora else 2e-9 * net)
        activations = max(each * args.micro, learnt, size.look + .4 * args.micro) * few / 2
        if args.offload:                                  # they are here while they encode
            activations = max(activations, few * texts / 1e9)
    state = 12 * (own + fake + heads) + rl_moments
    saved = dict(float32=4).get(args.save_dtype, 2)
    student = saved * (own if args.lora else net + texts + vae)
    return dict(frozen=frozen / 1e9, trained=trained / 1e9, activations=activations,
                main=main / 1e9, state=state / 1e9, student=student / 1e9, counted=counted)

def card(device):
    """GB of a CUDA card, or of main memory for each rank of this machine."""
    if device.type == 'cuda':
        return torch.cuda.get_device_properties(device).total_memory / 1e9
    here = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9 / here

def peak(device):
    """GB that this process held at most: on its CUDA card, else in main memory."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 1e9
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (1e9 if sys.platform == 'darwin' else 1e6)

def default_recipe(parser, recipes):
    """'sdxl' where the cards of this machine hold its run with the flags that were given, else
    'toy', with a line that says so."""
    if not torch.cuda.is_available():
        return 'toy'
    as_sdxl = argparse.Namespace(**recipes['sdxl'], recipe='sdxl')   # which go before defaults
    args = parser.parse_known_args(namespace=as_sdxl)[0]
    world, here = (int(os.environ.get(name, 1)) for name in ('WORLD_SIZE', 'LOCAL_WORLD_SIZE'))
    need = gigabytes(args, world, here, True)
    total = need['frozen'] + need['trained'] + need['activations']
    room = card(torch.device('cuda'))
    if total < .95 * room:                            # the allocator and NCCL want some as well
        return 'sdxl'
    print0(f'SDXL takes {total:.1f} GB on each of {world} cards, which have {room:.1f}: the toy '
           'in its place. --recipe sdxl --lora 64 --gan_crop 512 takes less, more ranks do')
    return 'toy'

def plan(args, out, device):
    """Prints what a run with these settings takes, beside what there is; ends with a sentence where
    it cannot fit, but for --force. Returns GB a rank, as far as they are counted."""
    if not Path(args.model).exists() and not hub_id(args.model):
        die(f'--model {args.model} does not exist')
    world, here = dist.get_world_size(), int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    need = gigabytes(args, world, here, device.type == 'cuda')
    total = need['frozen'] + need['trained'] + need['activations']
    room, main = card(device), card(torch.device('cpu'))
    # two states and one in the making, the student and the one that takes its place
    disk = 3 * need['state'] + 2 * need['student']
    held = [file.stat().st_size for file in out.glob('*/*') if file.is_file()]
    free = (shutil.disk_usage(out).free + sum(held)) / 1e9
    more = f'{need["activations"]:.1f} activations'
    more = more if need['counted'] else 'activations not counted at this size'
    aside = f', {need["main"]:.1f} GB of main memory of {main:.1f}' if need['main'] else ''
    print0(f'plan: {total:.1f} GB a rank ({need["frozen"]:.1f} frozen, {need["trained"]:.1f} '
           f'trained, {more}), which has {room:.1f}{aside}; {disk:.1f} GB of disk, of which '
           f'{free:.1f} are free')
    if args.force:
        return total
    if total > room:
        whole = not args.lora
        ways = {'more ranks': whole, '--lora 64': whole, 'a smaller --micro': args.micro > 1,
                '--gan_crop 512': args.gan == 'pixel' and not args.gan_crop,
                '--offload': not args.offload, '--cpu_offload': whole and not args.cpu_offload}
        less = ' or '.join(words for words, helps in ways.items() if helps)
        die(f'the run takes {total:.1f} GB on each rank, which has {room:.1f}: '
            f'{less or "a larger card"} may do; --force tries all the same')
    if need['main'] > main:
        die(f'--cpu_offload takes {need["main"]:.1f} GB of main memory for each rank, which has '
            f'{main:.1f}: --lora 64 takes less; --force tries all the same')
    if disk > free:
        die(f'--out {out} has {free:.1f} GB free, the run writes {disk:.1f}: choose another disk; '
            '--force begins all the same')
    return total

# --------------------------------------------------------------------------------------------------
# the state of a run: state-<iteration>/rank<r>.safetensors has what rank r holds of weights and
# moments. Its keys, 'student.weight/<name>@<row>', 'student.exp_avg/<name>@<row>'..., end in where
# the piece begins, so any number of ranks reads them, each its own rows. state.json has the files'
# sizes and checksums

def states_of(folder):
    """The saved states in a run's folder, oldest first; what a kill left (.tmp) is none."""
    return sorted(Path(folder).glob('state-' + '[0-9]' * 7))

def iteration_of(state):
    """At which iteration a state was saved; 0 for None."""
    return int(state.name.removeprefix('state-')) if state else 0

def pieces(weights, opts):
    """{key: tensor} of what this rank is to write: of sharded tensors its share, if it is not
    another machine's repetition, and of whole ones about as much as every other rank."""
    found, held = {}, [0] * dist.get_world_size()
    seen = set()                                # weights that have two optimisers are written once
    for net, named in weights.items():
        moments = opts[net].state if net in opts else {}
        for name, w in named.items():
            first, _ = rows(w)
            kinds = moments.get(w, {})
            if id(w) not in seen:
                kinds = dict(weight=w) | kinds
            seen.add(id(w))
            for kind, value in kinds.items():
                if isinstance(value, DTensor):
                    mine = not any(value.device_mesh.get_coordinate()[:-1])
                else:
                    writer = held.index(min(held))
                    held[writer] += value.nbytes
                    mine = writer == dist.get_rank()
                if mine and local(value).numel():
                    found[f'{net}.{kind}/{name}@{first}'] = local(value).detach().contiguous()
    return found

def save_state(out, it, args, weights, opts, last, save_student):
    """Writes out/state-<it> and, by save_student(), the student; every rank calls it.

    weights: {network: {name: tensor}}, opts: {network: its optimiser}, not saved under other names.
    Files reach the disk before the state appears, in one rename; the one before it stays, older
    ones go. A save that fails ends the run; with --disk_full skip only if it is the last.
    """
    began = time.time()
    check_alike(it, weights)
    rank = dist.get_rank()
    tensors = pieces(weights, opts)
    # the student's files are at most as large as its fp32 weights
    need = sum(gathered(sum(x.nbytes for x in tensors.values())))
    need += sum(w.nbytes for w in weights['student'].values())
    tmp = out / f'state-{it:07d}.tmp'
    file = tmp / f'rank{rank}.safetensors'
    trouble = entry = ''
    if rank == 0:
        for unfinished in out.glob('state-*.*'):                       # of a run that was killed
            remove(unfinished)
        tmp.mkdir()
    dist.barrier()
    try:
        if need > shutil.disk_usage(out).free:
            raise OSError(errno.ENOSPC, 'No space left on device')
        save_file(tensors, file)
        flush(file)
        entry = [file.stat().st_size, crc(file)]
    except (OSError, SafetensorError) as error:
        trouble = str(error)
    entries = gathered((file.name, entry, trouble))
    trouble = ' '.join(words for *_, words in entries).strip()
    if not trouble:
        try:
            save_student()
            if rank == 0:
                files = {name: entry for name, entry, _ in entries}
                state = dict(iteration=it, args=settings(args), files=files)
                (tmp / 'state.json').write_text(json.dumps(state, indent=1))
                flush(tmp / 'state.json', tmp)
                os.replace(tmp, tmp.with_suffix(''))
                flush(out)
        except (OSError, SafetensorError) as error:
            trouble = str(error)
    trouble = ' '.join(gathered(trouble)[0].split())[:200]
    if rank == 0:
        remove(tmp)
        for old in states_of(out)[:-2]:
            remove(old)
    if not trouble:
        seconds = time.time() - began
        print0(f'{it:5d}/{args.iters}  saved, {need / 1e9:.2f} GB, {seconds:.1f} s')
        return
    free = shutil.disk_usage(out).free
    words = f'--out {out}: the save at iteration {it} failed ({trouble})'
    way_out = 'mend that'
    if need > free:
        words += (f': it needs {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free, '
                  f'{(need - free) / 1e9:.2f} GB missing')
        way_out = 'make room'
    if states_of(out):
        words += '; the save before it stays'
    if last or args.disk_full == 'stop':
        die(f'{words}; {way_out} and run again')
    print0(f'{words}, going on to the next')

def crc(file):
    """CRC-32 of a file: it finds what disks and copies do to files, and costs less than SHA-256."""
    value = 0
    with open(file, 'rb') as f:
        while block := f.read(1 << 24):
            value = zlib.crc32(block, value)
    return value

def damage(state):
    """What is wrong with a saved state's files, by state.json; '' for nothing. Every rank calls it
    and reads its share of them."""
    found, rank, world = '', dist.get_rank(), dist.get_world_size()
    try:
        files = json.loads((state / 'state.json').read_text())['files']
        odd = sorted({file.name for file in state.glob('*.safetensors')} ^ files.keys())
        for name in bar(sorted(files)[rank::world] if not odd else (), f'{state}: checksums'):
            if [(state / name).stat().st_size, crc(state / name)] != files[name]:
                odd = [name]
        found = f'{odd[0]} is not what was written' if odd else ''
    except BAD_FILE as error:
        found = f'state.json cannot be read: {error}'
    return next(filter(None, gathered(found)), '')

def newest_state(folder, flag='--out', own=True):
    """The newest sound state in a run's folder, or None. A damaged one is passed over with a line
    and, where the run is this one's own, set aside until the next save."""
    states, damaged = gathered(states_of(folder))[0], []
    while states and (wrong := damage(states[-1])):
        print0(f'{states[-1]} is damaged ({wrong}): the one before it, if there is one')
        damaged.append(states.pop())
    if damaged and not states:
        die(f'{flag} {folder}: no state in it is sound; choose another {flag}')
    for state in damaged if own and dist.get_rank() == 0 else ():
        os.replace(state, f'{state}.damaged')
    return states[-1] if states else None

def find_state(out, args):
    """The newest sound state of this run, or None. Ends with a sentence where --out holds another
    run or a finished one; settings that differ from the saved ones are printed."""
    state = newest_state(out)
    if state is None:
        return None
    print0(f'resuming {state}, of iteration {iteration_of(state)}')
    with sentence(f'{state} is not a state of this script; choose another --out'):
        saved = json.loads((state / 'state.json').read_text())
        old, new = saved['args'], settings(args)
        if ('rl_ratio' in old) != ('rl_ratio' in new):
            die(f'--out {out} holds a run of the other stage; choose another --out')
        for key, none in dict(model='', lora=0, fake_lora=0, base_lora=[]).items():
            if old.get(key, none) != new.get(key, none):
                die(f'--out {out} holds a run of --{key} {old.get(key, none)}, not {new[key]}; '
                    'choose another --out')
        began, now = (each.get('init_iteration') for each in (old, new))
        if began not in (None, now):                     # its reference would be another student
            die(f'--init {args.init} is of iteration {now} now, and the run in --out {out} began '
                f'from its iteration {began}; choose another --out')
    if saved['iteration'] >= new['iters']:
        print0(f'{out} is finished, at {saved["iteration"]} of {new["iters"]} iterations, and '
               'nothing is changed: give more --iters to go on, another --out for a new run')
        leave()
    for key in sorted(old.keys() & new.keys()):
        if old[key] != new[key]:
            print0(f'--{key} is {new[key]} now, was {old[key]}')
    return state

@torch.no_grad()
def load_state(state, weights, opts, partly=False):
    """Puts a saved state into weights and optimisers, of which each rank reads its own rows;
    returns the names of the networks found. partly: others may be missing, or of other weights."""
    # {network: {weight's name: {kind: [(first row, file, key)]}}}
    found = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    if state is None:
        return found.keys()
    with sentence(f'{state} does not fit these networks; choose another --out or --init'):
        for file in sorted(state.glob('*.safetensors')):
            file = safe_open(file, 'pt')
            for key in file.keys():
                place, _, first = key.partition('@')
                net, kind, name = place.replace('/', '.', 1).split('.', 2)
                found[net][name][kind].append((int(first or 0), file, key))
        if partly:                                   # another kind of discriminator, adapters
            found = {net: kinds for net, kinds in found.items()
                     if net in weights and {k: whole_shape(v['weight']) for k, v in kinds.items()}
                     == {k: [*w.shape] for k, w in weights[net].items()}}
        seen = set()
        for net, named in weights.items():
            if partly and net not in found:
                continue
            once = seen.isdisjoint(map(id, named.values()))        # else another net's, and moments
            assert not once or found[net].keys() == named.keys(), f'it has other weights of {net}'
            moments = {}
            for name, w in named.items():
                kinds = found[net][name]
                if once:
                    fill(w, kinds.pop('weight'), name)
                seen.add(id(w))
                moments[w] = {}
                for kind, saved in kinds.items():
                    shape = whole_shape(saved)
                    value = torch.zeros_like(w) if shape == [*w.shape] else torch.zeros(shape)
                    fill(value, saved, name)
                    moments[w][kind] = value
            if net in opts:                      # which counts its weights group by group
                own = [w for group in opts[net].param_groups for w in group['params']]
                moments = {i: moments[w] for i, w in enumerate(own)}
                opts[net].load_state_dict(opts[net].state_dict() | dict(state=moments))
    return found.keys()

def whole_shape(saved):
    """The shape of a saved tensor, [(first row, file, key)], of all its pieces together."""
    shapes = [file.get_slice(key).get_shape() for _, file, key in saved]
    return [sum(count for count, *_ in shapes), *shapes[0][1:]] if shapes[0] else []

def fill(w, saved, name):
    """Puts into w its own rows of a saved tensor, [(first row, file, key)]."""
    if not w.ndim:
        (_, file, key), = saved
        w.copy_(file.get_tensor(key))
        return
    start, end = rows(w)
    total = 0
    for first, file, key in saved:
        piece = file.get_slice(key)
        count, *rest = piece.get_shape()
        assert rest == [*w.shape[1:]], f'{name} has the shape {[count, *rest]}'
        total += count
        low, high = max(start, first), min(end, first + count)
        if low < high:
            local(w)[low - start:high - start] = piece[low - first:high - first]
    assert total == len(w), f'{name} has {total} rows'

# --------------------------------------------------------------------------------------------------
# the log

class Log:
    """log('name', tensor) in an iteration, log.write(it) at its end: means over micro-batches,
    iterations and ranks, one line to read, one JSON line to plot."""

    def __init__(self, out, start, device, args):
        self.file = out / 'log.jsonl'
        self.device, self.args = device, args
        self.seen, self.clock = {}, time.time()
        self.begin, self.last = (start, time.time()), start
        self.dropped = self.in_a_row = 0
        self.data = Counter()                     # TROUBLE with the data, of this rank
        if dist.get_rank():
            return
        # a killed run has logged beyond its last save, and perhaps half a line
        self.file.touch()
        for file, until in (self.file, start), (out / 'eval.jsonl', start - 1):
            lines = file.read_text().splitlines() if file.exists() else []
            kept = [x for x in lines if x.endswith('}') and json.loads(x)['iteration'] <= until]
            if kept != lines:
                file.write_text(''.join(f'{x}\n' for x in kept))
        (out / 'args.json').write_text(json.dumps(settings(args) | versions(), indent=1))
        if args.wandb:
            import wandb
            wandb.init(project=args.wandb, config=settings(args))

    def __call__(self, name, value):
        value = torch.as_tensor(value, device=self.device, dtype=torch.float32)
        self.seen.setdefault(name, []).append(value.detach())

    def count(self, it, norms):
        """Counts an iteration in which an update was dropped, a None in norms; ten in a row end
        the run."""
        dropped = None in norms
        self.dropped += dropped
        self.in_a_row = self.in_a_row + 1 if dropped else 0
        if self.in_a_row == 10:
            states = states_of(self.file.parent)
            whence = f'goes on from {states[-1].name}' if states else 'begins anew, none is saved'
            die(f'10 iterations in a row had a non-finite gradient, up to {it}; lower the learning '
                f'rates or --gan_weight and run again: it {whence}')

    def trouble(self):
        """What was wrong with the data, on all ranks, in words; every rank calls it."""
        found = sum(gathered(self.data), Counter())
        return ', '.join(f'{found[reason]} {reason}' for reason in TROUBLE if found[reason])

    def write(self, it):
        """The only place where metrics leave the device: every --log_every iterations, and after
        the first of a run."""
        if it % self.args.log_every and it > 1:
            return
        for reason in TROUBLE:
            self(f'data/{reason}', self.data[reason] * dist.get_world_size())
        names = sorted(self.seen)
        values = torch.stack([torch.stack(self.seen[name]).mean() for name in names])
        dist.all_reduce(values)
        row = dict(zip(names, (values / dist.get_world_size()).tolist()))
        seconds = (time.time() - self.clock) / (it - self.last)
        self.seen, self.clock, self.last = {}, time.time(), it
        if dist.get_rank():
            return
        shown = {name: value for name, value in row.items() if not name.startswith('data/')}
        text = '  '.join(f'{name} {value:.4f}' for name, value in shown.items())
        start, began = self.begin
        left = (time.time() - began) / (it - start) * (self.args.iters - it)
        speed = f'{seconds:.2f} s/it, {span(left)} left'
        print(f'{it:5d}/{self.args.iters}  {text}  {speed}', flush=True)
        row = dict(iteration=it) | row | dict(
            seconds=seconds, dropped=self.dropped, memory=peak(self.device))
        with self.file.open('a') as file:
            file.write(json.dumps(row) + '\n')
        if self.args.wandb:
            import wandb
            wandb.log(row, step=it)

def span(seconds):
    """A time to read: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f'{seconds:.0f} s'
    return f'{seconds / 60:.0f} min' if seconds < 6000 else f'{seconds / 3600:.1f} h'

def bar(items, words):
    """items, with a progress bar on rank 0's terminal, gone when they are."""
    return tqdm(items, words, leave=False, disable=dist.get_rank() > 0 or None)

def curves(log, path):
    """Draws every column of a log.jsonl against the iteration, a panel each, as a PNG."""
    import matplotlib
    matplotlib.use('Agg')
    import pandas
    if not log.stat().st_size:             # somebody took it away, and no iteration is due since
        return
    table = pandas.read_json(log, lines=True).set_index('iteration')
    table = table.filter(regex='^(?!skipped|data/|dropped|memory)').sort_index(axis=1).interpolate()
    panels = table.plot(subplots=True, layout=(-1, 4), figsize=(14, 10), grid=True)
    figure = panels.flat[0].figure
    figure.tight_layout()
    with replacing(path) as tmp:
        figure.savefig(tmp, format='png')

# --------------------------------------------------------------------------------------------------
# data

class Unreadable(Exception):
    """So many pictures in a row cannot be used that the data set is not what it was."""

PICTURES = '.png .jpg .jpeg .jfif .webp .bmp .gif .tif .tiff .avif'.split()
CAPTIONS = 'text caption captions prompt prompts txt description sentence sentences'.split()
# what is counted of the data: pictures passed over, and captions longer than the text encoders read
TROUBLE = 'missing', 'broken', 'small', 'uncaptioned', 'cut'
# what PIL raises for a file that is damaged, or no picture
BROKEN = (OSError, ValueError, TypeError, SyntaxError, EOFError, struct.error,
          Image.DecompressionBombError)

def open_picture(source):
    """The first frame of a picture as a viewer shows it, in RGB: upright (EXIF), over white where
    it is transparent, 16 bits and floats scaled to 8. source: path or bytes; raises BROKEN."""
    image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in 'IF':
        values = np.nan_to_num(np.asarray(image, np.float32))
        white = 65535.
        if image.mode == 'F':                   # 0..1, unless there is more
            white = next((w for w in (1., 255.) if values.max() <= w), 65535.)
        image = Image.fromarray((values / white * 255).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert('RGB')

def flat(row, before=''):
    """A row's columns, {name: value}; a nested one's name has dots: json.prompt."""
    found = {}
    for key, value in row.items():
        nested = isinstance(value, dict) and not is_picture(value)
        found |= flat(value, f'{before}{key}.') if nested else {before + key: value}
    return found

def is_picture(value):
    """Whether a value is a picture's record ({'bytes', 'path'}), its bytes or its path."""
    if isinstance(value, dict):
        return value.keys() == {'bytes', 'path'}
    if isinstance(value, str):
        return Path(value).suffix.lower() in PICTURES and '://' not in value and '\n' not in value
    with contextlib.suppress(*BROKEN):
        return isinstance(value, bytes) and bool(Image.open(io.BytesIO(value)))
    return False

def picture_folder(folder, shown, whole):
    """{column: values} of the pictures among the paths `shown`, and where they are the whole folder
    of those that its metadata names: 'image', records, with what a metadata.jsonl or .csv in their
    folder or above has of them (file_name...), else the lines of NAME.txt or NAME.caption beside
    them as 'text'; all but the records are lists of strings."""
    entries = {}
    for name in sorted(glob.glob('**/metadata.*', root_dir=folder, recursive=True)):
        file = folder / name
        if file.suffix not in ('.jsonl', '.csv'):
            continue
        text = file.read_text(encoding='utf-8-sig')
        if file.suffix == '.csv':
            comma = ',' if ',' in text.split('\n')[0] else ';'
            table = csv.DictReader(io.StringIO(text), delimiter=comma)
        else:
            table = (json.loads(line) for line in text.split('\n') if line.strip())
        for entry in table:
            key = next((k for k in ('file_name', 'image', 'file') if k in entry), None)
            assert key, f'{file} has a line without file_name'
            entries[file.parent / entry.pop(key).replace('\\', '/')] = entry
    found = {file for file in shown if file.suffix.lower() in PICTURES}
    rows = []
    for file in sorted(found | entries.keys() if whole else found):
        beside = [f for f in map(file.with_suffix, ('.txt', '.caption')) if f.exists()]
        entry = entries.get(file) or {
            'text': f.read_text(encoding='utf-8-sig').split('\n') for f in beside}
        lists = {k: v if isinstance(v, list) else [v] for k, v in entry.items()}
        row = {k: [str(x) for x in values if x is not None] for k, values in lists.items()}
        rows.append(row | dict(image=dict(path=str(file.absolute()), bytes=None)))
    names = dict.fromkeys(name for row in rows for name in row if name)
    return {name: [row.get(name) for row in rows] for name in names}

def first_rows(source, files, limit):
    """The first rows of a set on the hub, the rest of which is not fetched."""
    import datasets
    stream = datasets.load_dataset(source, data_files=files, split='train', streaming=True)
    yield from (stream.decode(False) if stream.features else stream).take(limit)

def load_rows(source, files='', limit=0):
    """A datasets.Dataset of a hub id, of a .parquet or .tar file, or of a folder of such files or
    of pictures, all of it one set, whatever their names; files narrows it to a pattern, limit to
    the first."""
    import datasets
    path = Path(source)
    if not path.exists() and limit:
        how = dict(source=source, files=files or None, limit=limit)
        return datasets.Dataset.from_generator(first_rows, gen_kwargs=how)
    if not path.exists():
        # a part of a set does not have the sizes that its card tells
        return datasets.load_dataset(
            source, data_files=files or None, split='train',
            verification_mode='no_checks' if files else None)
    found = [path]
    if path.is_dir():
        names = glob.glob(files or '**/*', root_dir=path, recursive=True)
        found = [path / name for name in sorted(names)]
    for suffix, builder in ('.parquet', 'parquet'), ('.tar', 'webdataset'):
        tables = [glob.escape(str(f.resolve())) for f in found if f.suffix == suffix]
        if tables:
            rows = datasets.load_dataset(builder, data_files=tables, split='train')
            break
    else:
        rows = datasets.Dataset.from_dict(picture_folder(path, found, not files))
    return rows.select(range(min(len(rows), limit or len(rows))))

@functools.lru_cache(4)
def order_of(seed, epoch, n):
    """The order in which n rows are gone through in an epoch."""
    return torch.randperm(n, generator=generator(seed, 1, epoch))

class Pictures:
    """Captioned pictures by position: the p-th sample of an endless shuffled stream that depends
    on (seed, p) alone.

    source, files, limit: as for load_rows. The columns: a dot reaches into a nested one; '' finds
    the one that holds pictures, and the one that has a usual caption's name. captioned=False reads
    no captions. A sample is a dict of 'pixels' (3, size, size) float32 in [-1, 1], centre-cropped,
    'text', and 'trouble', a Counter by reason (TROUBLE) of what was passed over to get it; small
    is a picture whose shorter side is below size / 2. Of several captions one is drawn.
    """

    def __init__(self, source, files, image_column, text_column, size, seed, flag='--data', limit=0,
                 captioned=True):
        import datasets                            # not in quiet(): it costs sample.py a second
        quiet()
        datasets.logging.set_verbosity_error()
        datasets.disable_progress_bars()
        self.name = f'{flag} {source}'
        self.size = size
        self.seed = seed
        if not source or not Path(source).exists() and not hub_id(source):
            die(f'{self.name} does not exist')
        with sentence(f'{self.name} could not be loaded or downloaded; {flag} assets/toy/data runs '
                      'offline'):
            self.rows = load_rows(source, files, limit).with_format('arrow')  # pictures undecoded
        self.home = Path(source) if Path(source).is_dir() else Path(source).parent  # of paths in it
        if not len(self.rows):
            die(f'{self.name} holds no .parquet, no .tar and no picture'
                + (f' by the name {files}' if files else '')
                + '; give a folder of them, such a file or a hub id')
        # what the columns hold, by the first rows
        heads = {}
        for i in range(min(8, len(self.rows))):
            for name, value in self._row(self.rows, i).items():
                heads.setdefault(name, []).append(value)
        every = ', '.join(heads)
        pictures = [name for name, values in heads.items() if any(map(is_picture, values))]
        texts = [name for name in heads if name.split('.')[-1].lower() in CAPTIONS]
        # paths only where there is nothing better: a caption may look like one
        own = [name for name in pictures if not any(isinstance(x, str) for x in heads[name])]
        own = own or [name for name in pictures if name not in texts]
        for option, named, fit, what, way_out in (
                ('--image_column', image_column, own, 'pictures', ''),
                ('--text_column', text_column, texts, 'captions',
                 ', or put NAME.txt beside each picture NAME.jpg'))[:1 + captioned]:
            if named and named not in heads:
                die(f'{option} {named}: {self.name} has no such column, only {every}')
            if not named and len(fit) != 1:
                found = f'several columns of {what},' if fit else f'no column of {what} among'
                die(f'{self.name} has {found} {", ".join(fit) or every}: name one with '
                    f'{option}{way_out}')
            if named and what == 'pictures' and named not in pictures:
                die(f'{option} {named} of {self.name} does not hold pictures')
        self.image_column = image_column or own[0]
        self.text_column = (text_column or texts[0]) if captioned else None
        self.said = f'{self.name}: {len(self.rows)} pictures in the column {self.image_column}'
        self.said += f', captions in {self.text_column}' if captioned else ''
        if captioned:                                           # read without their pictures
            own = {self.text_column, self.text_column.split('.')[0]} & {*self.rows.column_names}
            self.texts = self.rows.select_columns([*own])

    @staticmethod
    def _row(rows, place):
        row, = rows[place].to_pylist()
        return flat(row)

    def _place(self, position):
        epoch, place = divmod(position, len(self.rows))
        return int(order_of(self.seed, epoch, len(self.rows))[place])

    def _text(self, row, position):
        """The caption in a row, one drawn where there are several; None where there is none."""
        if self.text_column is None:
            return ''
        values = row.get(self.text_column)
        values = values if isinstance(values, list) else [values]
        texts = [str(x).strip() for x in values if isinstance(x, (str, int, float)) and x == x]
        texts = [text for text in texts if text]
        if not texts:
            return None
        stream = generator(self.seed, 1, position, 1)
        return texts[torch.randint(len(texts), (1,), generator=stream).item()]

    def captions(self, positions):
        """The captions at these positions of the stream, where there is none the next one; no
        picture is read."""
        found = []
        for position in positions:
            places = range(position, position + 2 * len(self.rows))
            texts = (self._text(self._row(self.texts, self._place(p)), p) for p in places)
            found.append(next((text for text in texts if text), ''))
        return found

    def _pixels(self, value):
        """A row's picture as a tensor, or why there is none, one of TROUBLE."""
        if isinstance(value, dict):
            value = value['bytes'] or value['path']
        try:
            if value is None:
                return 'missing'
            image = open_picture(value if isinstance(value, bytes) else self.home / value)
        except FileNotFoundError:
            return 'missing'
        except BROKEN:
            return 'broken'
        if min(image.size) < self.size / 2:
            return 'small'
        image = ImageOps.fit(image, (self.size, self.size), Image.LANCZOS)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1

    def at(self, position):
        """What lies just there: pixels, or why there are none, one of TROUBLE; its caption."""
        row = self._row(self.rows, self._place(position))
        text = self._text(row, position)
        return 'uncaptioned' if text is None else self._pixels(row.get(self.image_column)), text

    def __getitem__(self, position):
        most = min(2 * len(self.rows), 1000)          # from amid an epoch, every row of the next
        trouble = Counter()
        for p in range(position, position + most):
            pixels, text = self.at(p)
            if not isinstance(pixels, str):
                return dict(pixels=pixels, text=text, trouble=trouble)
            trouble[pixels] += 1
        reasons = ', '.join(f'{count} {reason}' for reason, count in trouble.items())
        raise Unreadable(f'{self.name}: {most} pictures in a row cannot be used ({reasons}; small '
                         f'is below {self.size // 2} px); put the files back, run again')

    def batches(self, mine, batch, its, workers):
        """This rank's share of the batches of iterations `its`, the samples `mine` of 0..batch-1:
        dicts of 'pixels' (b, 3, size, size), 'text', a list, and 'trouble'. `workers` threads read
        two batches ahead; 0: the caller's own reads when asked."""
        pool = ThreadPoolExecutor(max(1, workers))
        read = pool.map if workers else map
        jobs = (read(self.__getitem__, [it * batch + i for i in mine]) for it in its)
        ahead = deque(itertools.islice(jobs, 2 if workers else 0))
        try:
            while True:
                ahead.extend(itertools.islice(jobs, 1))
                if not ahead:
                    return
                samples = list(ahead.popleft())
                yield dict(pixels=torch.stack([x['pixels'] for x in samples]),
                           text=[x['text'] for x in samples],
                           trouble=sum((x['trouble'] for x in samples), Counter()))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

class Prompts(Pictures):
    """The lines of --prompts_only as Pictures without pixels (3, 0, 0)."""

    def __init__(self, file, seed):
        self.rows = read_prompts(file, '--prompts_only')
        self.seed = seed
        self.said = f'--prompts_only {file}: {len(self.rows)} prompts, no pictures'

    def captions(self, positions):
        return [self.rows[self._place(position)] for position in positions]

    def __getitem__(self, position):
        text, = self.captions([position])
        return dict(pixels=torch.empty(3, 0, 0), text=text, trouble=Counter())

# --------------------------------------------------------------------------------------------------
# pictures to look at

def picture_grid(rows, captions, path, labels=('',)):
    """Writes rows of pictures as one PNG, at most 8 columns, each picture over its caption.

    rows: list of (n, 3, H, W) in [-1, 1]; captions: n strings; labels: what a row's begin with.
    """
    from torchvision.transforms.functional import pil_to_tensor, to_pil_image
    from torchvision.utils import make_grid
    pictures = ((torch.cat(rows).float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    size = pictures.shape[-1]
    side = max(128, min(512, size))
    how = Image.NEAREST if size < side else Image.LANCZOS
    texts = [f'{label}{caption}' for label in labels for caption in captions]
    texts = [textwrap.wrap(text, side // 7)[:4] for text in texts]
    foot = 4 + 15 * max(map(len, texts))
    tiles = []
    for picture, lines in zip(pictures, texts):
        tile = Image.new('RGB', (side, side + foot), 'white')
        tile.paste(to_pil_image(picture).resize((side, side), how))
        pen = ImageDraw.Draw(tile)
        pen.multiline_text((2, side), '\n'.join(lines), 'black', ImageFont.load_default(12))
        tiles.append(pil_to_tensor(tile))
    sheet = make_grid(tiles, nrow=min(8, len(captions)), pad_value=255)
    with replacing(path) as tmp:
        to_pil_image(sheet).save(tmp, 'PNG')
