"""
Everything that two scripts must agree on: the noise convention, a base model taken apart, the discriminators, the
losses, backward simulation, data, checkpoints, picture grids.

The one convention (DESIGN: both families, eps-, v- and flow-prediction):

    x_t = alpha_t x0 + sigma_t eps        t is what the network is conditioned on, 0..1000, 1000 = noise

Losses and samplers are written with alpha, sigma and x0 only. References: Flash-DMD (arXiv 2511.20549), DMD2 (2405.14867),
ADM (2507.18569) for the discriminator heads, SenseFlow (2506.00523) for the coupling of the fake score.
"""

import argparse
import contextlib
import copy
import errno
import functools
import io
import json
import os
import pickle
import shutil
import signal
import sys
import textwrap
import threading
import time
import warnings
import zlib
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------------------------------------------------
# errors and files


def die(message, alone=False):
    """Ends the run with one sentence for the user and exit code 2: one line per machine, as all ranks come to the same end,
    unless this rank is alone with its trouble."""
    if alone or os.environ.get('LOCAL_RANK', '0') == '0':
        print(f'error: {message}', file=sys.stderr, flush=True)
    sys.exit(2)


def parser(doc):
    """An ArgumentParser for a script: the docstring as help, no abbreviated flags, errors in one line."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                   allow_abbrev=False, usage='%(prog)s [--flag value ...], see --help')


def at_least(args, **least):
    """Ends with a sentence for the first flag in args that is below its least value, or nan or infinite."""
    for flag, value in least.items():
        if not value <= getattr(args, flag) < float('inf'):
            die(f'--{flag} {getattr(args, flag)} must be at least {value}, and finite')


def ranks():
    """This process's rank, its rank on this machine, and how many ranks there are, from the environment as torchrun sets it."""
    given = {k: os.environ[k] for k in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT') if k in os.environ}
    if not given.keys() & {'RANK', 'LOCAL_RANK', 'WORLD_SIZE'}:
        return 0, 0, 1
    try:
        rank, local, world = (int(given[k]) for k in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE'))
        assert 0 <= rank < world and local >= 0 and (world == 1 or int(given['MASTER_PORT']) > 0 and given['MASTER_ADDR'])
    except (KeyError, ValueError, AssertionError):
        os.environ.pop('LOCAL_RANK', None)                                               # who is to speak is not known
        die(f'{" ".join(f"{k}={v}" for k, v in given.items())} in the environment is not what torchrun sets; start ranks with '
            'torchrun, or unset them')
    gpus, here = torch.cuda.device_count(), max(local + 1, int(os.environ.get('LOCAL_WORLD_SIZE', 1)))
    if torch.cuda.is_available() and here > gpus:
        die(f'--nproc_per_node: {here} ranks on this machine, which has {gpus} CUDA devices; each rank needs its own')
    return rank, local, world


def quiet():
    """No progress bars, warnings and retry reports from the Hugging Face libraries; their errors become sentences."""
    import datasets
    import diffusers
    import huggingface_hub
    import transformers
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
    warnings.filterwarnings('ignore', message='.*lru_cache')                      # torch.compile's, of diffusers' own code
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary path beside `path`, a file or a folder; on success it takes path's place in one rename, on any
    error what stood there stays. What is written reaches the disk before the name does, so a power cut leaves no empty file."""
    path = Path(path)
    temporary = path.with_name(f'{path.name}.tmp{path.suffix}')

    def remove(p):
        shutil.rmtree(p) if p.is_dir() else p.unlink(missing_ok=True)

    def flush(p):
        handle = os.open(p, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    remove(temporary)
    try:
        yield temporary
        for p in [*temporary.rglob('*'), temporary]:
            flush(p)
        if path.is_dir():                            # a folder cannot be renamed onto another that is not empty
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


def writable_folder(path, flag):
    """Makes the folder `path`; ends with a sentence that names the flag when it cannot be written."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f'.probe{os.getpid()}'
        probe.touch()
        probe.unlink()
    except OSError as error:
        die(f'{flag} {path} cannot be written ({error.strerror}); choose another folder')
    return path


def read_prompts(path, flag='--prompts'):
    """The non-empty lines of a text file."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding='utf-8').splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        die(f'{flag} {path} cannot be read as text ({error}); give a file with one prompt per line')
    lines = [line for line in lines if line]
    if not lines:
        die(f'{flag} {path} has no prompt in it; give a file with one prompt per line')
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# randomness: everything comes from (seed, iteration, sample), so a run does not depend on the number of ranks or the
# micro-batch, and resuming needs no generator state


def generator(*key):
    """A CPU generator for a tuple of non-negative integers; different tuples give independent streams."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


def draw(seed, it, samples, shape):
    """Normal and uniform numbers for the given samples of iteration `it`.

    shape: of one sample, e.g. (9, C, H, W). Returns normals (len(samples), *shape) and uniforms (len(samples), 4) in
    [0, 1), both float32 on the CPU.
    """
    streams = [generator(seed, it, int(i)) for i in samples]
    return torch.stack([torch.randn(shape, generator=g) for g in streams]), \
        torch.stack([torch.rand(4, generator=g) for g in streams])


# ---------------------------------------------------------------------------------------------------------------------
# the noise convention


class Schedule:
    """alpha(t), sigma(t) and the conversions of one diffusers scheduler; t is (B,) in 0..1000, everything fp32.

    kind is 'epsilon' or 'v_prediction' (variance preserving, from alphas_cumprod; v = alpha eps - sigma x0) or 'flow'
    (sigma = t / 1000, alpha = 1 - sigma, v = eps - x0).
    """

    def __init__(self, scheduler):
        config = scheduler.config
        self.kind = 'flow' if 'FlowMatch' in type(scheduler).__name__ else config.prediction_type
        self.shift = config.get('shift', 1.)
        if self.kind not in ('flow', 'epsilon', 'v_prediction'):
            die(f'--model: its scheduler predicts {self.kind!r}; only epsilon, v_prediction and flow matching are known')
        if self.kind != 'flow':
            self.bars = scheduler.alphas_cumprod.double().cpu()

    def alpha(self, t):
        """(B,) -> (B, 1, 1, 1)."""
        a = 1 - t.double() / 1000 if self.kind == 'flow' else self._bar(t).sqrt()
        return a.float().view(-1, 1, 1, 1)

    def sigma(self, t):
        """(B,) -> (B, 1, 1, 1)."""
        s = t.double() / 1000 if self.kind == 'flow' else (1 - self._bar(t)).sqrt()
        return s.float().view(-1, 1, 1, 1)

    def _bar(self, t):
        self.bars = self.bars.to(t.device)
        return self.bars[t.long()]

    def snr(self, t):
        """(alpha / sigma)^2, (B,) -> (B,)."""
        return ((self.alpha(t) / self.sigma(t)) ** 2).flatten()

    def noised(self, x0, eps, t):
        """x_t = alpha_t x0 + sigma_t eps; (B, C, H, W)."""
        return self.alpha(t) * x0 + self.sigma(t) * eps

    def x0(self, out, xt, t):
        """The network's own output -> x0, in fp32 whatever comes in: at t = 999 bf16 arithmetic is 41 % wrong."""
        out, xt, a, s = out.float(), xt.float(), self.alpha(t), self.sigma(t)
        return {'epsilon': lambda: (xt - s * out) / a, 'v_prediction': lambda: a * xt - s * out,
                'flow': lambda: xt - s * out}[self.kind]()

    def target(self, x0, eps, t):
        """What the network is trained to output for x_t."""
        return {'epsilon': lambda: eps, 'v_prediction': lambda: self.alpha(t) * eps - self.sigma(t) * x0,
                'flow': lambda: eps - x0}[self.kind]()

    def steps(self, n):
        """n student steps, evenly spaced and starting from pure noise: 4 gives 999, 749, 499, 249, or for flow matching
        with shift 3: 1000, 900, 750, 500."""
        u = torch.arange(n, 0, -1).double() / n
        return self._shifted(u).float() if self.kind == 'flow' else (1000 * u - 1).round().float()

    def _shifted(self, u):
        """A flow's noise level u in [0, 1] -> t, moved towards noise by the pipeline's shift (SD3, arXiv 2403.03206, eq. 23)."""
        return 1000 * self.shift * u / (1 + (self.shift - 1) * u)

    def low_noise(self, t):
        """True where SNR >= 1, the steps of the pixel GAN; t (B,). SNR is exactly 1 at SD3's last step, t = 500."""
        return self.snr(t) >= 1 - 1e-6

    def between(self, u, low, high):
        """Uniforms u in [0, 1) -> times t in [low, high]: whole numbers where the schedule is a table, for a flow what the shift
        makes of them."""
        if self.kind == 'flow':
            return self._shifted((low + (high - low) * u) / 1000)
        return (low + (high - low + 1) * u).floor()

    def training(self, u):
        """Uniforms u in [0, 1) -> the times a network of this kind learns its own target at: uniform over the table, for a flow
        logit-normal and shifted (SD3)."""
        return self._shifted(torch.special.ndtri(u).sigmoid()) if self.kind == 'flow' else self.between(u, 0, 999)


# ---------------------------------------------------------------------------------------------------------------------
# the base model: a diffusers pipeline taken apart


def load_pipeline(name, flag, dtype, t5=None):
    """DiffusionPipeline from a folder or a hub id, dtype as diffusers takes it; ends with one sentence when there is none.
    t5: of an SD3 pipeline's third text encoder, False leaves it on the disk, True insists on it, None takes what is there."""
    import diffusers
    quiet()
    if Path(name).exists() and not (Path(name) / 'model_index.json').exists():
        die(f'{flag} {name} is not a diffusers pipeline folder (it has no model_index.json)')
    if not Path(name).exists() and (str(name).count('/') != 1 or str(name)[0] in './~'):
        die(f'{flag} {name} does not exist')
    try:
        # a pipeline saved without its T5 has to be told so again
        index = Path(name) / 'model_index.json'
        parts = json.loads(index.read_text()) if index.exists() else {}
        without = {k: None for k in ('text_encoder_3', 'tokenizer_3') if t5 is False or parts.get(k) == [None, None]}
        pipe = diffusers.DiffusionPipeline.from_pretrained(str(name), dtype=dtype, use_safetensors=True, **without)
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, json.JSONDecodeError) as error:
        reason = ' '.join(str(error).split())[:300]
        if Path(name).exists():
            die(f'{flag} {name} is damaged or not a pipeline of safetensors files: {reason}')
        die(f'{flag} {name} could not be downloaded; {flag} assets/toy/sdxl runs offline ({reason})')
    if t5 and not getattr(pipe, 'text_encoder_3', None):
        die(f'--t5: {flag} {name} has no T5 text encoder; leave --t5 away, or use --no-t5')
    return pipe


def text_length(pipe):
    """Arguments for encode_prompt and a call of `pipe` that fix the length of its T5 context, where it has one: 256 tokens as
    diffusers has it, but without a T5 as many zeros as CLIP has tokens, SD3's own training, not 256."""
    if not hasattr(pipe, 'text_encoder_3'):
        return {}
    return dict(max_sequence_length=256 if pipe.text_encoder_3 else pipe.tokenizer_max_length)


class Base:
    """A pretrained text-to-image pipeline: text encoders, VAE, schedule and the frozen teacher network.

    Networks are called as base.x0(net, xt, t, y, cfg) or base.predict(net, xt, t, y), where net is the teacher or any
    copy of it, xt (B, C, H, W) latents, t (B,) and y = base.encode(prompts). dtype is the teacher's and the text
    encoders'; the VAE stays in fp32, because SDXL's overflows in fp16. t5 as for load_pipeline; with offload the text
    encoders wait in main memory between calls.
    """

    # the name of the network in a pipeline; but for it, condition() and the arguments of encode_prompt the families are alike
    FAMILIES = {'StableDiffusionXLPipeline': 'unet', 'StableDiffusion3Pipeline': 'transformer'}

    def __init__(self, name, flag='--model', device='cpu', dtype=torch.float32, t5=None, offload=False):
        self.name, self.device, self.offload = str(name), torch.device(device), offload
        self.pipe = load_pipeline(name, flag, {'vae': torch.float32, 'default': dtype}, t5)
        family = type(self.pipe).__name__
        if family not in self.FAMILIES:
            die(f'{flag} {name} is a {family}; this version distils {" and ".join(self.FAMILIES)} models')
        self.pipe.set_progress_bar_config(disable=True)
        self.part = self.FAMILIES[family]
        self.teacher, self.vae = getattr(self.pipe, self.part).eval().to(device), self.pipe.vae.eval().to(device)
        self.encoders = [net for net in (self.pipe.components.get(f'text_encoder{k}') for k in ('', '_2', '_3')) if net]
        for net in (self.teacher, self.vae, *self.encoders):
            net.requires_grad_(False)
        self.schedule = Schedule(self.pipe.scheduler)
        self.size = self.teacher.config.sample_size * self.pipe.vae_scale_factor           # pixels
        self.latent_shape = (self.teacher.config.in_channels,) + (self.teacher.config.sample_size,) * 2
        self.texts = text_length(self.pipe) | ({} if self.part == 'unet' else dict(prompt_2=None, prompt_3=None))
        if not offload:
            self.pipe.to(device)
        self.uncond = self._encode([''], empty=True)

    def trainable(self, lora=None):
        """A copy of the teacher to train: with fp32 weights of its own, read from the files, not from the bf16 teacher; or, given
        a peft LoraConfig, with the teacher's own frozen tensors and new fp32 adapters."""
        if lora is None:
            net = type(self.teacher).from_pretrained(self.name, subfolder=self.part, dtype=torch.float32)
            return net.to(self.device).train()
        net = twin(self.teacher)
        net.add_adapter(lora)
        for w in trained(net).values():
            w.data = w.data.to(self.device, torch.float32)
        return net.train()

    @torch.no_grad()
    def _encode(self, prompts, empty=False):
        # with empty=True the pipeline's own negative: zeros for SDXL (force_zeros_for_empty_prompt), else the encoded ''
        for net in self.encoders if self.offload else ():
            net.to(self.device)
        e, n, pe, pn = self.pipe.encode_prompt(prompts, device=self.device, do_classifier_free_guidance=empty, **self.texts)
        for net in self.encoders if self.offload else ():
            net.to('cpu')
        return (n, pn) if empty else (e, pe)

    def encode(self, prompts):
        """List of B strings -> y = (embeddings (B, L, D), pooled (B, P)), without gradient."""
        return self._encode(list(prompts))

    def condition(self, pooled):
        """What the network takes beside latents, time and embeddings; pooled (B, P)."""
        if self.part == 'transformer':
            return dict(pooled_projections=pooled)
        sizes = torch.tensor([self.size, self.size, 0, 0, self.size, self.size], device=pooled.device)
        return dict(added_cond_kwargs=dict(text_embeds=pooled, time_ids=sizes.expand(len(pooled), 6)))

    def autocast(self):
        """bf16 autocast on CUDA, nothing elsewhere."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == 'cuda')

    def predict(self, net, xt, t, y):
        """net's own output at (xt, t) under y, (B, C, H, W) float32; bf16 autocast inside on CUDA."""
        with self.autocast():
            # clones: torch.compile compiles anew for other strides, those of slices and expanded times, even in a batch of one
            xt, t = xt.clone(memory_format=torch.contiguous_format), t.clone(memory_format=torch.contiguous_format)
            return net(xt, timestep=t, encoder_hidden_states=y[0], **self.condition(y[1])).sample.float()

    def x0(self, net, xt, t, y, cfg=1.):
        """Predicted clean latents. With cfg = w != 1 guided as uncond + w (cond - uncond); w = 1 is no guidance."""
        if cfg == 1:
            return self.schedule.x0(self.predict(net, xt, t, y), xt, t)
        both = [torch.cat([c, u.expand_as(c)]) for c, u in zip(y, self.uncond)]
        c, u = self.predict(net, torch.cat([xt, xt]), torch.cat([t, t]), both).chunk(2)
        return self.schedule.x0(u + cfg * (c - u), xt, t)

    def decode(self, z):
        """Latents (B, C, h, w) -> pixels (B, 3, H, W), about [-1, 1], differentiable; fp32 outside autocast."""
        config = self.vae.config
        return self.vae.decode(z / config.scaling_factor + (config.get('shift_factor') or 0)).sample

    @torch.no_grad()
    def latents(self, pixels):
        """The inverse of decode: pixels (B, 3, H, W) in [-1, 1] -> the mean latents (B, C, h, w)."""
        config = self.vae.config
        return (self.vae.encode(pixels).latent_dist.mean - (config.get('shift_factor') or 0)) * config.scaling_factor

    @torch.no_grad()
    def teacher_samples(self, prompts, noise, steps, cfg):
        """The teacher's own pictures, by its pipeline and scheduler: noise (B, C, h, w) -> pixels (B, 3, H, W)."""
        self.pipe.to(self.device)
        z = self.pipe(list(prompts), num_inference_steps=steps, guidance_scale=cfg, height=self.size, width=self.size,
                      latents=noise.to(self.device, self.teacher.dtype), output_type='latent', **text_length(self.pipe)).images
        for net in self.encoders if self.offload else ():
            net.to('cpu')
        return self.decode(z.float())


# ---------------------------------------------------------------------------------------------------------------------
# LoRA: a student or fake score that has the teacher's frozen tensors, not a copy of them, and adapters of its own. One set of
# base weights serves all networks, no adapter is ever switched, and the teacher has none


def trained(net):
    """{name: parameter} of what net trains: all of it, the adapters, or the discriminator's heads."""
    return {k: w for k, w in net.named_parameters() if w.requires_grad}


@torch.no_grad()
def load_trained(net, tensors):
    """Puts tensors {name: value} into trained(net); RuntimeError where names or shapes are not the same."""
    mine = trained(net)
    odd = sorted(mine.keys() ^ tensors.keys()) or [k for k in mine if mine[k].shape != tensors[k].shape]
    if odd:
        raise RuntimeError(f'{len(odd)} tensors are missing, too many or of another shape, {odd[0]} among them')
    for k, w in mine.items():
        w.copy_(tensors[k])


def twin(net, dtype=None):
    """A copy of net that shares its frozen parameters and its buffers. dtype, where the copy is not to be trained: that of its own
    linear layers and convolutions. Autocast to dtype would cast them at every use, so it changes no bit of what they compute."""
    shared = [w for w in net.parameters() if not w.requires_grad] + list(net.buffers())
    other = copy.deepcopy(net, {id(w): w for w in shared})
    for part in other.modules() if dtype else ():
        if isinstance(part, (nn.Linear, nn.Conv2d)) and all(w.requires_grad for w in part.parameters()):
            part.to(dtype)
    return other


ATTENTION = ['to_q', 'to_k', 'to_v', 'to_out.0', 'add_q_proj', 'add_k_proj', 'add_v_proj', 'to_add_out']


def lora_config(net, rank, alpha, targets):
    """peft's LoraConfig for adapters B A alpha / rank on the modules of net whose names end in one of targets ('attention': the
    projections of all attention layers); one sentence where there is none, or one smaller than the rank."""
    from peft import LoraConfig
    ends = ATTENTION if targets == 'attention' else [x.strip() for x in targets.split(',')]
    found = {k: w for k, w in net.named_modules() if any(k == x or k.endswith('.' + x) for x in ends)}
    wrong = [k for k, w in found.items() if not isinstance(w, (nn.Linear, nn.Conv2d))]
    if not found or wrong:
        die(f'--lora_targets {targets}: ' + (f'{wrong[0]} is no linear layer or convolution' if wrong else 'the network has no '
            'such module') + "; give the ends of modules' names, with commas, or attention")
    least = min(found, key=lambda k: min(found[k].weight.shape[:2]))
    if rank > min(found[least].weight.shape[:2]):
        die(f'--lora {rank} is more than {least} has, {tuple(found[least].weight.shape[:2])}; choose at most '
            f'{min(found[least].weight.shape[:2])}')
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=ends, init_lora_weights='gaussian')


def backward_simulation(base, net, steps, noise, y, first=0, stop=None, x0=None):
    """Runs the few-step student from step index `first` up to, not including, `stop` (default: to the end).

    At each step x0 is noised to the step with fresh noise (pure noise at the very start, where x0 is None) and predicted
    anew: DMD2's multi-step sampler. steps (S,), noise (B, S, C, H, W), y the conditioning. Returns x0 (B, C, H, W), or
    the x0 passed in where there is no step to run. Call it under no_grad.
    """
    for k in range(first, len(steps) if stop is None else stop):
        x0 = base.x0(net, *at_step(base, steps, noise, k, x0), y)
    return x0


def at_step(base, steps, noise, k, x0):
    """The student's input (x_t, t) at step index k, given the x0 of the step before (None: pure noise)."""
    t = steps[k].expand(len(noise))
    return (noise[:, k] if x0 is None else base.schedule.noised(x0, noise[:, k], t)), t


# ---------------------------------------------------------------------------------------------------------------------
# the losses that both stages use


def dm_loss(x0, real, fake):
    """Distribution matching (Flash-DMD eq. 4 in DMD2's form): its gradient at x0 is g / x0.numel() with

        g = (fake - real) / mean|x0 - real|        per sample, the mean clamped at 1e-5

    x0 the student's sample, real and fake the two scores' x0 of its noised version; all (B, C, H, W) float32.
    """
    with torch.no_grad():
        g = (fake - real) / (x0 - real).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-5)
        goal = x0 - g
    return .5 * F.mse_loss(x0, goal)


def slope(loss, x):
    """(loss(x), its gradient at x) for x (B, ...), leaving the parameters that loss runs through without a gradient."""
    leaf = x.detach().requires_grad_()
    value = loss(leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def sample_norm(gradient):
    """L2 norm of one sample's gradient, the mean over a batch whose loss is a mean over samples: (B, ...) -> scalar."""
    return gradient.flatten(1).norm(dim=1).mean() * len(gradient)


def log_ratio(z, x0, ref, alpha, sigma):
    """log p(z) - log p_ref(z) of the few-step sampler's transitions N(alpha x0, sigma^2) and N(alpha ref, sigma^2), the mean
    over dimensions: (B, C, h, w) -> (B,). As a product, since the two squares differ in their last digits only."""
    return ((alpha * (x0 - ref)) * (z - alpha * (x0 + ref) / 2) / sigma ** 2).mean((1, 2, 3))


def diffusion_loss(base, net, x0, eps, t, y):
    """The fake score's loss (Flash-DMD eq. 6): plain mse on the network's native target at (x0, eps, t)."""
    out = base.predict(net, base.schedule.noised(x0, eps, t), t, y)
    return F.mse_loss(out, base.schedule.target(x0, eps, t))


def gan_losses(kind):
    """(discriminator's loss of (real, fake) logits, generator's loss of fake logits): hinge for the pixel GAN (Flash-DMD
    algorithm 1), softplus for DMD2's latent GAN. Logits of any shape, averaged."""
    if kind == 'pixel':
        return (lambda real, fake: F.relu(1 - real).mean() + F.relu(1 + fake).mean()), (lambda fake: -fake.mean())
    return (lambda real, fake: F.softplus(-real).mean() + F.softplus(fake).mean()), (lambda fake: F.softplus(-fake).mean())


@torch.no_grad()
def couple(fake, student, c):
    """psi <- c psi + (1 - c) theta on the fake score's live weights, with LoRA on its adapters (Flash-DMD eq. 11); c = 1 leaves
    it alone."""
    if c < 1:
        torch._foreach_lerp_(list(trained(fake).values()), list(trained(student).values()), 1 - c)


def update(opt, net, clip=1.):
    """Clips net's gradients to norm `clip` and steps; a non-finite gradient is dropped instead, and as gradients are
    averaged over ranks, on every rank alike. Returns the norm before clipping, or None when dropped."""
    norm = nn.utils.clip_grad_norm_([p for p in net.parameters() if p.grad is not None], clip)
    if torch.isfinite(norm):
        opt.step()
    opt.zero_grad(set_to_none=True)
    return norm if torch.isfinite(norm) else None


# ---------------------------------------------------------------------------------------------------------------------
# discriminators


class Head(nn.Sequential):
    """One logit from one feature map, (B, channels, h, w) -> (B, 1): ADM's three [conv 4x4 stride 2, GroupNorm 32, SiLU],
    one [conv 3x3, GroupNorm 32, SiLU], global average pool, linear."""

    def __init__(self, channels, width=256):
        layers = []
        for k in range(4):
            layers += [nn.Conv2d(width if k else channels, width, *((4, 2, 1) if k < 3 else (3, 1, 1))),
                       nn.GroupNorm(32, width), nn.SiLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1))

    def forward(self, x):
        if min(x.shape[-2:]) < 8:                    # three halvings need 8; only bottlenecks of small models are smaller
            x = F.interpolate(x, size=(8, 8))
        return super().forward(x)


SAM_URLS = {f'vit_{k}': f'https://dl.fbaipublicfiles.com/segment_anything/sam_vit_{k}_{v}.pth'
            for k, v in dict(b='01ec64', l='0b3195', h='4b8939').items()}


def build_sam_encoder(state):
    """(ImageEncoderViT with weights, indices of its global-attention blocks) from a segment_anything state dict; vit_b,
    vit_l, vit_h or any other size, all read off the tensors. KeyError, RuntimeError... where it is not one."""
    from segment_anything.modeling import ImageEncoderViT
    prefix = 'image_encoder.'
    state = {k[len(prefix):]: v.float() for k, v in state.items() if k.startswith(prefix)}
    pos, patch = state['pos_embed'], state['patch_embed.proj.weight']
    dim, grid = pos.shape[-1], pos.shape[1]
    depth = 1 + max(int(k.split('.')[1]) for k in state if k.startswith('blocks.'))
    reach = [(len(state[f'blocks.{i}.attn.rel_pos_h']) + 1) // 2 for i in range(depth)]        # side of the window
    global_blocks = [i for i in range(depth) if reach[i] == grid]
    encoder = ImageEncoderViT(
        img_size=grid * patch.shape[-1], patch_size=patch.shape[-1], embed_dim=dim, depth=depth,
        num_heads=dim // state['blocks.0.attn.rel_pos_h'].shape[1], out_chans=len(state['neck.0.weight']),
        mlp_ratio=len(state['blocks.0.mlp.lin1.weight']) / dim, use_rel_pos=True, window_size=min(reach),
        norm_layer=lambda d: nn.LayerNorm(d, eps=1e-6), global_attn_indexes=global_blocks)
    encoder.load_state_dict(state)
    return encoder.requires_grad_(False).eval(), global_blocks


def load_sam_encoder(name, flag='--sam'):
    """build_sam_encoder on a checkpoint file, or on vit_b, vit_l, vit_h (downloaded once); one sentence if it fails."""
    offline = f'{flag} assets/toy/sam.pth runs offline, --gan latent and --gan none need no SAM'
    try:
        if name in SAM_URLS:
            state = torch.hub.load_state_dict_from_url(SAM_URLS[name], map_location='cpu', weights_only=True)
        else:
            state = torch.load(name, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        die(f'{flag} {name} does not exist; give a segment_anything checkpoint, vit_b, vit_l or vit_h ({offline})')
    except OSError as error:
        die(f'{flag} {name} could not be downloaded or read ({error}); {offline}')
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError):
        die(f'{flag} {name} is not a plain state dict of tensors (truncated, or with a pickled payload); {offline}')
    try:
        return build_sam_encoder(state)
    except (AttributeError, KeyError, ValueError, RuntimeError, IndexError, TypeError):
        die(f'{flag} {name} is not a segment_anything checkpoint (image_encoder tensors missing or misshapen); {offline}')


class PixelDiscriminator(nn.Module):
    """Frozen SAM image encoder, one trained Head on each of its global-attention blocks.

    forward: pixels (B, 3, H, W) in [-1, 1] -> logits (B, number of heads), differentiable in the pixels. A whole picture
    of `size` pixels is resized to the encoder's own input; a crop of one is resized by the same factor, and the position
    embedding with it, so that a crop costs what its area costs.
    """

    def __init__(self, encoder, global_blocks, size, checkpointing=False):
        super().__init__()
        self.encoder, self.blocks, self.size, self.checkpointing = encoder, global_blocks, size, checkpointing
        self.heads = nn.ModuleList(Head(encoder.pos_embed.shape[-1]) for _ in global_blocks)
        mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
        self.register_buffer('mean', (mean / 127.5 - 1).view(1, 3, 1, 1), persistent=False)
        self.register_buffer('std', (std / 127.5).view(1, 3, 1, 1), persistent=False)

    def features(self, x):
        """The global-attention blocks' outputs, a list of (B, dim, h, w)."""
        patch = self.encoder.patch_embed.proj.kernel_size[0]
        side = max(1, round(x.shape[-1] * self.encoder.img_size / self.size / patch)) * patch
        x = F.interpolate(x, size=(side, side), mode='bilinear', antialias=True, align_corners=False)
        x = self.encoder.patch_embed((x - self.mean) / self.std)                                       # (B, h, w, dim)
        pos = self.encoder.pos_embed.permute(0, 3, 1, 2)
        if pos.shape[-2:] != x.shape[1:3]:
            pos = F.interpolate(pos, size=x.shape[1:3], mode='bicubic', align_corners=False)
        x, out = x + pos.permute(0, 2, 3, 1), []
        for i, block in enumerate(self.encoder.blocks[:self.blocks[-1] + 1]):
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing and x.requires_grad else block(x)
            if i in self.blocks:
                out.append(x.permute(0, 3, 1, 2))                                                      # (B, dim, h, w)
        return out

    def forward(self, x):
        return torch.cat([head(f) for head, f in zip(self.heads, self.features(x))], 1)


class _Stop(Exception):
    pass


def encoder_features(base, net, xt, t, y):
    """What the first half of a network makes of (xt, t, y), a list of maps (B, C, h, w) float32: of a UNet the output of each
    down stage before its downsampler and that of the mid block, of a transformer the image tokens after each block. The other
    half is not computed. net must be the bare module, not its DDP wrapper."""
    stages = []

    def stage(block, inputs, output):                # (result, one residual for each resnet and for the downsampler)
        stages.append(output[1][len(block.resnets) - 1])

    def tokens(block, inputs, output):                                                            # (text, image (B, h w, C))
        stages.append(output[1].transpose(1, 2).unflatten(2, (round(output[1].shape[1] ** .5), -1)))

    def middle(block, inputs, output):
        stages.append(output)

    def stop(block, inputs, output):
        raise _Stop

    half = net.config.num_layers // 2 if base.part == 'transformer' else 0
    hooks = [(block, tokens) for block in net.transformer_blocks[:half]] if half else [
        *((block, stage) for block in net.down_blocks), (net.mid_block, middle)]
    hooks = [block.register_forward_hook(hook) for block, hook in hooks + [(hooks[-1][0], stop)]]
    with contextlib.suppress(_Stop), contextlib.ExitStack() as stack:
        for hook in hooks:
            stack.callback(hook.remove)
        base.predict(net, xt, t, y)
    return [x.float() for x in stages]


def encoder_channels(net):
    """The channels of encoder_features' maps."""
    if hasattr(net, 'mid_block'):
        return [*net.config.block_out_channels, net.config.block_out_channels[-1]]
    return [net.inner_dim] * (net.config.num_layers // 2)


def bottleneck(base, net, xt, t, y):
    """The output of the mid block, or of the middle of a transformer's, (B, C, h, w) float32: what DMD2's latent discriminator
    looks at."""
    return encoder_features(base, net, xt, t, y)[-1]


# ---------------------------------------------------------------------------------------------------------------------
# the latent reward


class LatentReward(nn.Module):
    """LPO's latent reward model (LRM-XL, arXiv 2502.01051): how much noisy latents please under their prompt,

        score = exp(logit_scale) cos(W v, e)

    e: the pooled projection of the second text encoder; v: the averages of encoder_features of a UNet, or the same of a
    transformer, at (z_t, t), the last one guided with weight 7.5 against the encoded empty prompt. It has CLIP text encoders of
    its own and uses the base model's tokenizers, T5, latents and schedule. forward: z (B, C, h, w), t (B,), y = encode(prompts)
    -> (B,) fp32.
    """

    def __init__(self, base, net, text_encoder, text_encoder_2):
        super().__init__()
        self.pipe = type(base.pipe)(**base.pipe.components | {base.part: net} | dict(
            text_encoder=text_encoder, text_encoder_2=text_encoder_2))
        self.base, self.net, self.text_encoder, self.text_encoder_2 = base, net, text_encoder, text_encoder_2
        for unread in self.UNREAD[base.part]:
            setattr(net, unread, None)
        if base.part == 'transformer':
            net.transformer_blocks = net.transformer_blocks[:net.config.num_layers // 2]
        self.dim = text_encoder_2.config.projection_dim
        self.visual_projection = nn.Linear(sum(encoder_channels(net)), self.dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))                                             # log(1 / .07)

    UNREAD = {'unet': ['up_blocks', 'conv_norm_out', 'conv_out'], 'transformer': ['norm_out', 'proj_out']}

    def encode(self, prompts):
        """List of B strings -> (embeddings (2 B, L, D), pooled (2 B, P)), the second half those of the empty prompt."""
        each = list(dict.fromkeys([*prompts, '']))                                     # candidates of a prompt share it
        y = self.pipe.encode_prompt(each, device=self.base.device, do_classifier_free_guidance=False, **self.base.texts)[::2]
        return [v[[each.index(p) for p in [*prompts, *[''] * len(prompts)]]] for v in y]

    def forward(self, z, t, y):
        *stages, mid = [f.mean((2, 3)) for f in encoder_features(self.base, self.net, z.repeat(2, 1, 1, 1), t.repeat(2), y)]
        cond, uncond = mid.chunk(2)
        v = torch.cat([f.chunk(2)[0] for f in stages] + [uncond + 7.5 * (cond - uncond)], 1)              # (B, sum C)
        e = y[1].chunk(2)[0][:, -self.dim:].float()                                                              # (B, dim)
        return self.logit_scale.float().exp() * F.cosine_similarity(F.linear(v, self.visual_projection.weight.float()), e)


def load_latent_reward(name, base, flag='--lrm'):
    """LatentReward from a folder in the layout of casiatao/LRM's SDXL model (unet/, of SD3 transformer/, text_encoder/,
    text_encoder_2/, state_dict.pt) or hub_id/subfolder, frozen; one sentence where it is missing, damaged, or of another base
    model."""
    quiet()
    way_out = (f'give {flag} a folder with {base.part}/, text_encoder/, text_encoder_2/ and state_dict.pt; for a base model that has '
               'none, train one as tests/make_toy.py does, or go on with train_stage1.py')
    folder = Path(name)
    try:
        if not folder.exists():
            import huggingface_hub
            if str(name).count('/') < 1 or str(name)[0] in './~':
                die(f'{flag} {name} does not exist; {way_out}')
            repo, inside = '/'.join(str(name).split('/')[:2]), '/'.join(str(name).split('/')[2:])
            folder = Path(huggingface_hub.snapshot_download(repo, allow_patterns=f'{inside}/*' if inside else None)) / inside
        dtype = base.teacher.dtype
        net, info = type(base.teacher).from_pretrained(folder / base.part, dtype=dtype, output_loading_info=True)
        unread, layers = LatentReward.UNREAD[base.part], net.config.get('num_layers', 0)
        unread = [*unread, *(f'transformer_blocks.{k}' for k in range(layers // 2, layers))]
        needed = [k for k in info['missing_keys'] if not k.startswith(tuple(f'{x}.' for x in unread))]
        if needed or net.config.in_channels != base.latent_shape[0]:
            die(f'{flag} {name}: its {base.part} ' + (f'lacks {needed[0]} and {len(needed) - 1} more' if needed else
                f'reads {net.config.in_channels} latent channels, --model {base.name} has {base.latent_shape[0]}'))
        texts = [type(getattr(base.pipe, sub)).from_pretrained(folder / sub, dtype=dtype) for sub in ('text_encoder', 'text_encoder_2')]
        state = torch.load(folder / 'state_dict.pt', map_location='cpu', weights_only=True)
        reward = LatentReward(base, net, *texts)
        reward.visual_projection.load_state_dict(state['visual_projection'])
        reward.logit_scale.data = torch.as_tensor(state['logit_scale']).float()
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        die(f'{flag} {name} could not be loaded or downloaded; {way_out} ({" ".join(str(error).split())[:200]})')
    return reward.to(base.device).eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# data


class Unreadable(Exception):
    """So many pictures in a row cannot be read that the data set is not what it was."""


class Pictures(torch.utils.data.Dataset):
    """Captioned pictures by position: the p-th sample of an endless shuffled stream that depends on (seed, p) alone.

    source: a hub id, a folder of pictures (imagefolder), of parquet or of webdataset tar files, or one such file; files
    narrows it to matching names. Columns are named with dots for nested ones (json.prompt). Each sample is a dict of
    'pixels' (3, size, size) float32 in [-1, 1], centre-cropped, 'text', and 'skipped': how many broken or tiny pictures
    (shorter side below size / 2) were passed over to get it.
    """

    def __init__(self, source, files, image_column, text_column, size, seed, flag='--data'):
        import datasets
        quiet()
        where, options = source, dict(split='train')
        if files:
            options['data_files'] = files
        if Path(source).is_file():
            where = {'.parquet': 'parquet', '.tar': 'webdataset'}.get(Path(source).suffix)
            options['data_files'] = str(source)
            if where is None:
                die(f'{flag} {source} is neither .parquet nor .tar; give such a file, a folder or a hub id')
        elif not Path(source).exists() and (source.count('/') != 1 or source[0] in './~'):
            die(f'{flag} {source} does not exist')
        elif Path(source).is_dir() and not files and list(Path(source).rglob('*.tar')):
            where, options['data_files'] = 'webdataset', sorted(map(str, Path(source).rglob('*.tar')))
        try:
            rows = datasets.load_dataset(where, **options)
        except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            reason = ' '.join(str(error).split())[:300]
            die(f'{flag} {source} could not be loaded or downloaded; {flag} assets/toy/data runs offline ({reason})')
        if not len(rows):
            die(f'{flag} {source} has no rows')
        columns = rows.column_names
        for option, name in [('--image_column', image_column), ('--text_column', text_column)]:
            if name.split('.')[0] not in columns:
                die(f'{option} {name}: {flag} {source} has no such column, only {", ".join(columns)}')
        if not isinstance(rows.features[image_column], datasets.Image):
            die(f'--image_column {image_column} of {flag} {source} does not hold pictures')
        self.rows = rows.cast_column(image_column, datasets.Image(decode=False)).select_columns(
            [image_column, text_column.split('.')[0]])
        self.texts = self.rows.select_columns([text_column.split('.')[0]])
        self.image_column, self.text_path, self.size, self.seed = image_column, text_column.split('.'), size, seed
        self.source = f'{flag} {source}'
        self.epoch, self.order = None, None

    def _text(self, row):
        """The caption in a row, None where there is none."""
        for key in self.text_path:
            row = row[key] if isinstance(row, dict) else row
        row = row[0] if isinstance(row, list) and row else row
        return row if isinstance(row, str) else None

    def captions(self, positions):
        """The captions of the pictures at these positions of the stream, '' for none; no picture is read."""
        return [self._text(self.texts[k]) or '' for k in map(self._place, positions)]

    def _place(self, position):
        epoch, place = divmod(position, len(self.rows))
        if epoch != self.epoch:
            self.order = torch.randperm(len(self.rows), generator=generator(self.seed, 1, epoch))
            self.epoch = epoch
        return int(self.order[place])

    def __getitem__(self, position):
        for skipped in range(min(len(self.rows), 1000)):
            row = self.rows[self._place(position + skipped)]
            pixels, text = self._pixels(row[self.image_column]), self._text(row)
            if pixels is not None and text is not None:
                return dict(pixels=pixels, text=text, skipped=skipped)
        raise Unreadable

    def _pixels(self, record):
        try:
            image = Image.open(io.BytesIO(record['bytes']) if record['bytes'] else record['path'])
            if min(image.size) < self.size / 2:
                return None
            image = ImageOps.fit(image.convert('RGB'), (self.size, self.size), Image.LANCZOS)
        except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError):
            return None
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1

    def batches(self, batch, rank, world, its, workers):
        """Yields this rank's share of the batches of iterations `its`. Decoding runs in worker processes; where one dies (out
        of memory, a damaged disk, a job queue's SIGTERM), new ones go on with the same batch, three times at most."""
        mine, its, done, deaths = range(rank * batch // world, (rank + 1) * batch // world), [*its], 0, 0
        # fork, since a spawned worker would run the training script again from its first line; on a Mac, where forking
        # is not safe, the pictures are decoded in the main process
        workers = 0 if sys.platform == 'darwin' else workers
        while done < len(its):
            try:
                loader = iter(torch.utils.data.DataLoader(
                    self, batch_size=len(mine), sampler=[it * batch + i for it in its[done:] for i in mine],
                    num_workers=workers, multiprocessing_context='fork' if workers else None,
                    pin_memory=torch.cuda.is_available()))
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)          # torch's raises wherever the run is, not in next() only
                for rows in loader:
                    yield rows
                    done, deaths = done + 1, 0
            except GeneratorExit:                                     # at the interpreter's end the names below are gone
                raise
            except Unreadable:
                die(f'{self.source}: {min(len(self.rows), 1000)} pictures in a row, from iteration {its[done]} on, cannot be '
                    f'read, are smaller than {self.size // 2} px or have no caption; put the files back and run again', alone=True)
            except (RuntimeError, OSError, EOFError) as error:       # an OSError: it died before its batch was handed over
                if not workers or isinstance(error, RuntimeError) and 'DataLoader worker' not in str(error):
                    raise
                deaths += 1
                if deaths > 3:
                    die(f'{self.source}: its worker processes died {deaths} times at iteration {its[done]} '
                        f'({" ".join(str(error).split())[:200]}); use fewer --workers, or 0 for no such process', alone=True)
                print(f'rank {rank}: a data worker died at iteration {its[done]}, others take over', flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# a training run: what both stages do around and in an iteration


def training_flags(p, model_help):
    """Adds the flags of the distillation, which both stages have; their defaults are the recipe's."""
    yes_no = argparse.BooleanOptionalAction
    # what to distil, from what
    p.add_argument('--model', help=model_help)
    p.add_argument('--t5', action=yes_no, help="SD3's third text encoder; neither: as the pipeline has it")
    p.add_argument('--offload', action=yes_no, default=False, help='text encoders wait in main memory between iterations')
    p.add_argument('--sam', help='segment_anything checkpoint, or vit_b, vit_l, vit_h (downloaded)')
    p.add_argument('--data', help='captioned pictures: hub id, folder, .parquet or webdataset .tar')
    p.add_argument('--data_files', help='which files of --data, a pattern; empty: all')
    p.add_argument('--image_column', help='column of the pictures')
    p.add_argument('--text_column', help='column of the captions; a dot reaches into a nested one')
    p.add_argument('--prompts', help='text file; its first 8 lines are drawn in the sample grids')
    p.add_argument('--workers', type=int, default=2, help='data decoding processes per rank; 0: the main process')
    # method
    p.add_argument('--steps', type=int, default=4, help="the student's sampling steps")
    p.add_argument('--cfg', type=float, help="guidance of the teacher's score, uncond + w (cond - uncond)")
    p.add_argument('--gan', choices=['pixel', 'latent', 'none'], default='pixel',
                   help="pixel: SAM on decoded pictures; latent: DMD2's, on the fake score's bottleneck")
    p.add_argument('--gan_weight', type=float, help="weight of the generator's adversarial loss")
    p.add_argument('--gan_crop', type=int, default=0, help='pixels a side of the random crop that is decoded for the GAN; 0: all')
    p.add_argument('--split', action=yes_no, default=True,
                   help='DM loss at high noise and GAN at low noise only; no: both at every step')
    p.add_argument('--ttur', type=int, default=1, help='iterations of fake score and discriminator per student update')
    p.add_argument('--couple', type=float, default=.97, help='c in fake <- c fake + (1 - c) student; 1: off')
    p.add_argument('--lora', type=int, help='train adapters of this rank on the frozen teacher')
    p.add_argument('--no-lora', dest='lora', action='store_const', const=None, help='train all weights')
    p.add_argument('--lora_alpha', type=float, default=0., help='adapters are scaled by this / rank; 0: twice the rank')
    p.add_argument('--lora_targets', default='attention', help="ends of the names of modules that get an adapter, with commas; "
                   'attention: the projections of all attention layers')
    # optimisation
    p.add_argument('--iters', type=int, help='iterations')
    p.add_argument('--batch', type=int, help='prompts per iteration, over all ranks')
    p.add_argument('--micro', type=int, help='prompts per forward on one rank; gradients accumulate')
    p.add_argument('--student_lr', type=float, help='AdamW learning rate of the student')
    p.add_argument('--fake_lr', type=float, help='AdamW learning rate of the fake score')
    p.add_argument('--heads_lr', type=float, help='AdamW learning rate of the discriminator heads')
    p.add_argument('--warmup', type=int, help='iterations of linear learning-rate warm-up')
    p.add_argument('--cooldown', type=int, help='last iterations, over which the learning rates fall linearly to 0')
    p.add_argument('--checkpointing', action=yes_no, help='gradient checkpointing in all networks')
    p.add_argument('--compile', action=yes_no, default=False, help='torch.compile for all networks but the text encoders')
    p.add_argument('--seed', type=int, default=0, help='seed of the run')
    # output
    p.add_argument('--save_every', type=int, help='iterations between saves')
    p.add_argument('--save_dtype', choices=['float16', 'bfloat16', 'float32'], default='float16', help="of student/'s weights")
    p.add_argument('--sample_every', type=int, help='iterations between sample grids; 0: none')
    p.add_argument('--log_every', type=int, help='iterations between log lines')
    # machines
    p.add_argument('--shard', action=yes_no, default=True, help='each rank keeps its share of the optimiser states, not all')
    p.add_argument('--timeout', type=float, default=30., help='minutes without an iteration after which a hung run ends')
    p.add_argument('--disk_full', choices=['stop', 'skip'], default='stop',
                   help='where a save finds no room: stop, or train on to the next save')
    p.add_argument('--wandb', default='', help='Weights & Biases project to log to as well; empty: none')


class Run:
    """One process of a run: its ranks and device, the output folder and the log. args are the script's flags."""

    def __init__(self, args):
        self.args, self.began = args, time.time()
        self.rank, local, self.world = ranks()
        self.cuda, self.master = torch.cuda.is_available(), self.rank == 0
        self.device = torch.device('cuda', local) if self.cuda else torch.device('cpu')
        at_least(args, batch=1, micro=1, iters=1, steps=1, ttur=1, save_every=1, log_every=1, sample_every=0, warmup=0,
                 cooldown=0, workers=0, seed=0, gan_crop=0, couple=0, lora_alpha=0, timeout=.05,
                 **{} if args.lora is None else dict(lora=1))
        if args.couple > 1:
            die(f'--couple {args.couple} must be at most 1')
        at_least(args, student_lr=0, fake_lr=0, heads_lr=0, gan_weight=0, cfg=0)
        if args.steps > 1000:
            die(f'--steps {args.steps} is more than the 1000 noise levels there are')
        if args.seed >= 2 ** 63:
            die(f'--seed {args.seed} must be below 2^63')
        unit = self.world * args.micro
        if args.batch % unit:
            die(f'--batch {args.batch} is not a multiple of {self.world} ranks x --micro {args.micro}; '
                f'change --batch to {max(1, args.batch // unit) * unit} or lower --micro')
        self.out = writable_folder(args.out, '--out')
        for file in sorted(self.out.glob('state-' + '[0-9]' * 7 + '/state.json'))[-1:]:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):           # damaged: load_state has the sentence
                if ('rl_ratio' in json.loads(file.read_text())['args']) != ('rl_ratio' in args):
                    die(f'--out {self.out} holds a run of the other stage; choose another --out')
        if self.cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision('high')
        self.it, self.moved, self.told, self.parent = None, float('inf'), False, os.getppid()
        if self.world > 1:
            threading.Thread(target=self.watch, daemon=True).start()
            patience = timedelta(minutes=args.timeout + 5)             # more than watch() has, which can say who is missing
            # torchrun's --max-restarts may keep the store, with the addresses of those who have died in it
            self.store = dist.PrefixStore(f'life {os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}',
                                          next(dist.rendezvous('env://', timeout=patience))[0])
            dist.init_process_group('nccl' if self.cuda else 'gloo', store=self.store, rank=self.rank, world_size=self.world,
                                    timeout=patience)
        sys.excepthook = self.unforeseen                 # torch.distributed sets one too, that would swallow this one's words
        torch.manual_seed(args.seed)                     # the heads' initial weights; all else has streams of its own
        self.mine = range(self.rank * args.batch // self.world, (self.rank + 1) * args.batch // self.world)
        self.meter, self.in_a_row, self.dropped, self.skipped = {}, 0, 0, 0
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, 'told', True))

    def print(self, *text):
        if self.master:
            print(*text, flush=True)

    def open_log(self, start):
        """log.jsonl up to iteration `start` (a killed run logs beyond its last save, and perhaps half a line), eval.jsonl
        before it, args.json."""
        self.log, self.clock = self.out / 'log.jsonl', time.time()
        if self.master:
            for file, until in (self.log, start), (self.out / 'eval.jsonl', start - 1):
                old = [x for x in file.read_text().splitlines() if x.endswith('}')] if file.exists() else []
                if old or file == self.log:
                    with replacing(file) as tmp:
                        tmp.write_text(''.join(x + '\n' for x in old if json.loads(x)['iteration'] <= until))
            with replacing(self.out / 'args.json') as tmp:
                tmp.write_text(json.dumps(vars(self.args), indent=1))
            if self.args.wandb:
                import wandb
                wandb.init(project=self.args.wandb, config=vars(self.args))

    def any(self, flag):
        """Whether flag is true on any rank, the same answer on all."""
        if self.world == 1:
            return flag
        flag = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return flag.item() > 0

    def told_to_stop(self, it):
        """At the start of iteration `it`: whether a rank has had SIGTERM. Ranks meet here, so watch() counts from here."""
        stop = self.any(self.told)
        self.it, self.moved = it, time.time()
        return stop

    def watch(self):
        """Ends a process whose iteration takes longer than --timeout, with a sentence on where each rank stands. A collective
        that waits for a hung rank cannot do that: gloo's names no rank, nccl's ends the process from outside Python. Without a
        torchrun ends as well: left alone, ranks would go on saving into the folder of the run that is started in their place."""
        limit = 60 * self.args.timeout
        while (waited := time.time() - self.moved) < limit:
            if os.getppid() != self.parent:
                print(f'error: rank {self.rank}: torchrun is gone; the last save in {self.out} is good, run again', file=sys.stderr,
                      flush=True)
                os._exit(2)
            time.sleep(min(limit - waited, 1) + .01)
        frame, where = sys._current_frames()[threading.main_thread().ident], 'outside'
        while frame:
            if Path(frame.f_code.co_filename).parent == Path(__file__).parent:
                where = f'at {Path(frame.f_code.co_filename).name}:{frame.f_lineno} ({frame.f_code.co_name})'
                break
            frame = frame.f_back
        key = f'stuck in {self.it}, rank '
        self.store.set(key + str(self.rank), where)
        time.sleep(min(limit, 5))                                                                    # for the others to do so
        found = {}
        for rank in range(self.world):
            answers = self.store.check([key + str(rank)])
            found.setdefault(self.store.get(key + str(rank)).decode() if answers else 'no answer', []).append(rank)
        if self.rank == min(rank for what, ranks in found.items() if what != 'no answer' for rank in ranks):
            print(f'error: iteration {self.it} has taken more than --timeout {self.args.timeout:g} minutes: '
                  + ', '.join(f'{what}: rank {", ".join(map(str, ranks))}' for what, ranks in found.items())
                  + f'; the last save in {self.out} is good, run again', file=sys.stderr, flush=True)
        os._exit(2)                                          # the main thread sits in a collective and cannot be asked to

    def unforeseen(self, kind, error, trace):
        """sys.excepthook: another rank's end and a full disk are known ends too, and no tracebacks."""
        when = f'in iteration {self.it}' if self.it is not None else 'before the first iteration'
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            die(f'--out {self.out}: no space left {when}; the last save is good, make room and run again', alone=True)
        if not isinstance(error, dist.DistError) and 'gloo' not in str(error):
            return sys.__excepthook__(kind, error, trace)
        print(f'error: rank {self.rank} lost another rank {when}, whose own last words say why; the last save in {self.out} is '
              'good, run again', file=sys.stderr, flush=True)
        os._exit(2)                                              # at a normal exit the group would wait for who is gone

    def check_alike(self, it, nets):
        """Ends the run where ranks hold different weights: compares the sum of each network's bits, as integers."""
        if self.world == 1:
            return
        whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        mine = torch.stack([torch.stack([w.detach().view(whole[w.element_size()]).sum(dtype=torch.int64)
                                         for w in net.parameters() if w.requires_grad]).sum() for net in nets.values()])
        sums = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(sums, mine)
        differ = torch.stack(sums).cpu() != sums[0].cpu()                                            # (world, networks)
        if differ.any():
            names = ', '.join(name for name, off in zip(nets, differ.any(0).tolist()) if off)
            ranks = ', '.join(str(k) for k, off in enumerate(differ.any(1).tolist()) if off)
            die(f'at iteration {it} the weights of {names} on rank {ranks} differ from those on rank 0, a bug or a faulty '
                f'device; nothing was saved, the save before this one in {self.out} is good')

    def note(self, name, value):
        """Adds a tensor, which stays on the device, to the mean of `name` in the next log line."""
        self.meter.setdefault(name, []).append(torch.as_tensor(value, device=self.device, dtype=torch.float32).detach())

    def report(self, it, line):
        """One line to read, one JSON line to plot; the only place where metrics leave the device.

        line: what to print, {name: label}; a name that ends in / stands for all that begin with it.
        """
        names = sorted(self.meter)
        values = torch.stack([torch.stack(self.meter[k]).mean() for k in names]
                             + [torch.tensor(float(self.skipped), device=self.device)])
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        now = time.time()
        row = dict(iteration=it) | dict(zip(names, values.tolist())) | dict(
            seconds=(now - self.clock) / self.args.log_every, dropped=self.dropped,
            skipped=round(values[-1].item() * self.world),
            memory=torch.cuda.max_memory_allocated() / 2 ** 30 if self.cuda else 0.)
        self.clock = now
        self.meter.clear()
        if self.master:
            text = ''
            for name, label in line.items():
                found = [k for k in names if k == name or name.endswith('/') and k.startswith(name)]
                shown = ' '.join(f'{row[k]:.4f}' + f'@{k[len(name):]}' * (k != name) for k in found)
                text += f'  {label} {shown}' if found else ''
            print(f'{it:5d}/{self.args.iters}{text}  {row["seconds"]:.2f} s/it', flush=True)
            with self.log.open('a') as file:
                file.write(json.dumps(row) + '\n')
            if self.args.wandb:
                import wandb
                wandb.log(row, step=it)

    def gathered(self, value):
        """{**value} of all ranks' dicts."""
        shares = [value]
        if self.world > 1:
            shares = [None] * self.world
            dist.all_gather_object(shares, value)
        return {k: v for share in shares for k, v in share.items()}

    def count(self, it, sizes):
        """Counts an iteration whose update was dropped (a None among the gradient norms); ten in a row end the run."""
        self.in_a_row = self.in_a_row + 1 if None in sizes else 0
        self.dropped += None in sizes
        if self.in_a_row == 10:
            die(f'10 iterations in a row had a non-finite gradient, up to {it}; the last save in {self.out} is good: lower '
                'the learning rates or --gan_weight and run again')

    def close(self, it):
        self.moved = float('inf')                                                            # for watch(): nothing to expect
        if it < self.args.iters:
            self.print(f'told to stop (SIGTERM) after iteration {it}, saved in {self.out}: the same command goes on from there')
        elif self.master:
            curves(self.log, self.out / 'curves.png')
            minutes = (time.time() - self.began) / 60
            print(f'done: {self.out / "student"} after {self.args.iters} iterations, {minutes:.1f} minutes, '
                  f'{self.dropped} iterations with a dropped update, {self.skipped} pictures skipped; '
                  f'python sample.py --ckpt {self.out}')
        if self.world > 1:
            dist.destroy_process_group()


class Distillation:
    """The networks of Flash-DMD's stage 1, their optimisers, and the pieces of one iteration: arXiv 2511.20549, algorithm 1.

    A part is one micro-batch: y the encoded prompts, eps (b, n, C, h, w) and u (b, 4) its random numbers, last: the
    rank's last of this iteration. s and l are indices into the student's steps, from high to low noise.
    """

    def __init__(self, base, run):
        args = run.args
        self.base, self.run, self.args, self.schedule = base, run, args, base.schedule
        self.steps = base.schedule.steps(args.steps).to(base.device)                                       # (S,)
        self.low = [k for k in range(args.steps) if base.schedule.low_noise(self.steps[k:k + 1])]
        self.high = [k for k in range(args.steps) if k not in self.low]
        if args.split and not (self.low and self.high):
            die(f'--steps {args.steps} gives {self.steps.long().tolist()}, none of them at {"low" if self.high else "high"} '
                'noise; use --no-split or more steps')
        self.lora = lora_config(base.teacher, args.lora, args.lora_alpha or 2 * args.lora, args.lora_targets) if args.lora else None
        self.student, self.fake, self.heads = base.trainable(self.lora), base.trainable(self.lora), None
        load_trained(self.fake, trained(self.student))            # adapters begin at random, but at one place: coupling mixes them
        if args.gan == 'pixel':
            self.heads = PixelDiscriminator(*load_sam_encoder(args.sam), base.size, args.checkpointing).to(base.device)
        elif args.gan == 'latent':
            self.heads = Head(encoder_channels(self.student)[-1]).to(base.device)
        if args.checkpointing:
            for net in (self.student, self.fake, base.vae):
                net.enable_gradient_checkpointing()
        self.scale = base.pipe.vae_scale_factor
        if args.gan_crop % self.scale or args.gan_crop > base.size:
            die(f'--gan_crop {args.gan_crop} must be a multiple of {self.scale} up to {base.size}, or 0')
        self.side = (args.gan_crop or base.size) // self.scale                               # of the decoded latents
        self.nets = {'student': self.student, 'fake': self.fake} | ({'heads': self.heads} if self.heads else {})
        self.rates = {'student': args.student_lr, 'fake': args.fake_lr, 'heads': args.heads_lr}
        adamw = torch.optim.AdamW if run.world == 1 or not args.shard else \
            lambda w, **options: ZeroRedundancyOptimizer(w, torch.optim.AdamW, **options)
        self.opts = {k: adamw([*trained(net).values()], lr=self.rates[k], betas=(.9, .999), weight_decay=.01, fused=run.cuda)
                     for k, net in self.nets.items()}
        self.teacher, self.decode = self.compiled(base.teacher), self.compiled(base.decode)
        self.d_loss, self.g_loss = gan_losses(args.gan)
        # DMD2's latent critic is the fake score itself, so its loss enters the fake score's update with a small weight
        self.critic_weight = 1. if args.gan == 'pixel' else 1e-2

    def compiled(self, f):
        """f, a network or a function, as one graph of torch.compile where --compile says so. Each has the shapes of --micro: what is
        drawn for the sample grids goes through the networks themselves."""
        return torch.compile(f, fullgraph=True, dynamic=False) if self.args.compile else f

    def distribute(self):
        """After the weights are loaded: the networks that compute, .fast, and around them, where there are ranks, those that
        average gradients, .wrapped."""
        self.fast = {k: self.compiled(net) for k, net in self.nets.items()}
        self.wrapped = {k: DDP(net, device_ids=[self.base.device.index] if self.run.cuda else None, broadcast_buffers=False,
                               gradient_as_bucket_view=True) if self.run.world > 1 else net for k, net in self.fast.items()}

    def sync(self, name, last):
        """Gradients of a network are averaged over ranks in its last backward of an iteration; wraps forward and backward."""
        free = last or self.run.world == 1 or name not in self.wrapped
        return contextlib.nullcontext() if free else self.wrapped[name].no_sync()

    def learning_rates(self, it, **other):
        """Linear warm-up and cool-down of every network's learning rate, or of another one given by its name."""
        args = self.args
        for name, opt in self.opts.items():
            for group in opt.param_groups:
                group['lr'] = other.get(name, self.rates[name]) * min(
                    1., (it + 1) / max(1, args.warmup), (args.iters - it) / max(1, args.cooldown))

    def parts(self, it, texts, pixels=None, extra=5):
        """This rank's micro-batches; eps has one normal per student step and `extra` more, five for a distillation."""
        normals, uniforms = draw(self.args.seed, it, self.run.mine, (len(self.steps) + extra,) + self.base.latent_shape)
        out, micro, y = [], self.args.micro, self.base.encode(texts)
        for k in range(0, len(texts), micro):
            part = slice(k, k + micro)
            out.append(SimpleNamespace(
                y=[v[part] for v in y], eps=normals[part].to(self.base.device),
                u=uniforms[part].to(self.base.device),
                texts=texts[part], pixels=None if pixels is None else pixels[part], last=k + micro >= len(texts)))
        return out

    def choose(self, it, key, pool):
        """One of pool, the same for all ranks."""
        return pool[torch.randint(len(pool), (1,), generator=generator(self.args.seed, it, 2 ** 31 + key)).item()]

    @torch.no_grad()
    def reach(self, part, s):
        """The student's input (x_s, t) at its step s, by backward simulation as at inference."""
        before = backward_simulation(self.base, self.fast['student'], self.steps, part.eps, part.y, stop=s)
        return at_step(self.base, self.steps, part.eps, s, before)

    def G(self, xt, t, y):
        """The student's x0 (b, C, h, w) float32, through the module that synchronises where there will be a gradient."""
        return self.base.x0((self.wrapped if torch.is_grad_enabled() else self.fast)['student'], xt, t, y)

    def student_backward(self, part, it, turn, share):
        """Items 1 to 4 of an iteration: gradients of `share` of L = L_DM + gan_weight L_adv where it is the student's turn
        to learn, else no more than its samples. Leaves them as part.x0 and part.seen, for critic_backward."""
        args, S = self.args, len(self.steps)
        s = self.choose(it, 1, self.high if args.split else range(S))                      # the same for all ranks
        with self.sync('student', part.last), torch.set_grad_enabled(turn):
            # 1. its sample at step s, reached as at inference
            x0 = z = self.G(*self.reach(part, s), part.y)                                               # (b, C, h, w)
            part.x0 = x0.detach()

            # 2. distribution matching, eq. 4: teacher's against fake score at a random noise level
            if turn:
                tau = self.schedule.between(part.u[:, 0], 20, 980)
                x_tau = self.schedule.noised(part.x0, part.eps[:, S], tau)
                with torch.no_grad():
                    r = self.base.x0(self.teacher, x_tau, tau, part.y, args.cfg)
                    f = self.base.x0(self.fast['fake'], x_tau, tau, part.y)
                dm, d_dm = slope(lambda x: dm_loss(x, r, f), x0)                                        # loss, dDM/dx0
                self.run.note(f'dm/{int(self.steps[s])}', dm), self.run.note('grad/dm', sample_norm(d_dm))

            # 3. GAN, eq. 8-9: finish the picture without gradient, noise it to a low-noise step, clean it once with gradient
            if args.gan != 'none' and args.split:
                with torch.no_grad():
                    end = backward_simulation(self.base, self.fast['student'], self.steps, part.eps, part.y, s + 1, x0=x0)
                    t_l = self.steps[self.choose(it, 2, self.low)].expand(len(end))
                    x_l = self.schedule.noised(end, part.eps[:, S + 1], t_l)
                z = self.G(x_l, t_l, part.y)                                                            # (b, C, h, w)
            if args.gan != 'none':
                leaf = z.detach().requires_grad_(turn)                   # the discriminator gets no gradient, only its input
                seen = self.view(leaf, it)                                                     # pixels (b, 3, H, W)
                part.seen = seen.detach()
            if args.gan != 'none' and turn:
                t_g = self.schedule.between(part.u[:, 1], 0, 999)                                    # the latent GAN's
                adv = self.g_loss(self.judge(self.fast['heads'], seen, part.eps[:, S + 2], t_g, part.y))
                d_adv, = torch.autograd.grad(adv, leaf)                                                 # dAdv/dz
                self.run.note('gan/g', adv), self.run.note('grad/gan', sample_norm(d_adv) * args.gan_weight)

            # 4. through the one or two student forwards
            if turn and args.gan != 'none':
                torch.autograd.backward([x0, z], [d_dm * share, d_adv * args.gan_weight * share])
            elif turn:
                x0.backward(d_dm * share)

    def critic_backward(self, part, it, share):
        """Items 5 and 6: the fake score learns the student's samples, eq. 6; the discriminator tells real from generated."""
        S, base, u = len(self.steps), self.base, part.u
        with self.sync('fake', part.last), self.sync('heads', part.last):
            t_f = self.schedule.training(u[:, 2])
            loss = diffusion_loss(base, self.wrapped['fake'], part.x0, part.eps[:, S + 3], t_f, part.y)
            self.run.note('fake', loss)
            if self.args.gan != 'none':
                both = torch.cat([self.real_view(part.pixels.to(base.device), it), part.seen])
                t = self.schedule.between(u[:, 3], 0, 999).repeat(2)
                real, made = self.judge(self.wrapped['heads'], both, torch.cat([part.eps[:, S + 4], part.eps[:, S + 2]]), t,
                                        [torch.cat([a, a]) for a in part.y]).chunk(2)
                d = self.d_loss(real, made)
                loss = loss + self.critic_weight * d
                self.run.note('gan/d', d), self.run.note('gan/real', real.mean()), self.run.note('gan/made', made.mean())
            (loss * share).backward()

    # the discriminator's view: pixels of a crop, or noised latents through the fake score's bottleneck

    def crop(self, x, it, unit):
        """The crop of iteration `it` (the same on every rank) of latents, unit = 1, or of pixels, unit = scale."""
        top, left = torch.randint(self.base.size // self.scale - self.side + 1, (2,),
                                  generator=generator(self.args.seed, it, 2 ** 31)).tolist()
        return x[..., top * unit:(top + self.side) * unit, left * unit:(left + self.side) * unit]

    def judge(self, net, seen, eps, t, y):
        """Logits for what view() or real_view() returned."""
        if self.args.gan == 'pixel':
            with self.base.autocast():
                return net(seen).float()
        return net(bottleneck(self.base, self.fake, self.schedule.noised(seen, eps, t), t, y))

    def view(self, z, it):
        with self.base.autocast():
            return self.decode(self.crop(z, it, 1)) if self.args.gan == 'pixel' else z

    def real_view(self, pixels, it):
        return self.crop(pixels, it, self.scale) if self.args.gan == 'pixel' else self.base.latents(pixels)

    def save(self, it, facts, last):
        """The whole state and the student as a pipeline; every rank calls it. last: the run ends with this save."""
        from safetensors import SafetensorError
        self.run.check_alike(it, self.nets)
        moments = {f'{name}.opt': whole_moments(opt) for name, opt in self.opts.items()}
        out, dtype, trouble = self.run.out, getattr(torch, self.args.save_dtype), None
        if self.run.master:
            tensors = [v for net in self.nets.values() for v in trained(net).values()]
            tensors += [v for part in moments.values() for v in part.values()]
            parts = [part for part in self.base.pipe.components.values() if isinstance(part, nn.Module) and not self.lora]
            need = sum(v.nbytes for v in tensors) + sum(w.numel() for part in parts for w in part.parameters()) * dtype.itemsize
            try:
                for unfinished in out.glob('state-*.*'):                                             # of a run that was killed
                    shutil.rmtree(unfinished)
                if need > shutil.disk_usage(out).free:
                    raise OSError(errno.ENOSPC, 'No space left on device')
                save_state(out, it, self.nets, moments, vars(self.args))
                facts |= dict(base_model=self.args.model, recipe=self.args.recipe, iteration=it, t5=self.args.t5)
                save_student(out / 'student', self.base, self.student, self.steps, dtype, facts, self.lora)
            except (OSError, SafetensorError) as error:
                free = shutil.disk_usage(out).free
                trouble = (f'--out {out}: the save at iteration {it} failed ({" ".join(str(error).split())[:200]}): it needs '
                           f'{need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free, {max(0, need - free) / 1e9:.2f} GB missing; the '
                           'save before it stays')
        if self.run.any(trouble is not None):
            if last or self.args.disk_full == 'stop':
                die(f'{trouble or "rank 0 could not save"}; make room and run again')
            self.run.print(f'{trouble}, going on to the next')

    @torch.no_grad()
    def pictures(self, prompts, noise):
        """What the student draws: (B, 3, H, W) about [-1, 1]; noise (B, S, C, h, w)."""
        return self.base.decode(backward_simulation(self.base, self.student, self.steps, noise, self.base.encode(prompts)))


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints


def whole_moments(opt):
    """{'<index of the weight>.<name>': tensor} of an optimiser. Where it is sharded every rank calls this, and rank 0 has the
    result: tensor by tensor, since ZeroRedundancyOptimizer's own consolidation holds a rank's whole share twice on each GPU."""
    local, index = getattr(opt, 'optim', opt), {w: i for i, w in enumerate(w for g in opt.param_groups for w in g['params'])}
    own = {f'{index[w]}.{k}': v for w, state in local.state.items() for k, v in state.items()}
    if local is opt:
        return own
    device, rank, shares, out = next(iter(index)).device, dist.get_rank(), [None] * dist.get_world_size(), {}
    dist.all_gather_object(shares, {k: (v.shape, v.dtype) for k, v in own.items()})
    for owner, share in enumerate(shares):
        for k, (shape, dtype) in share.items():
            value = own[k].to(device) if owner == rank else torch.empty(shape, dtype=dtype, device=device)
            dist.broadcast(value, owner)
            if rank == 0:
                out[k] = value.cpu()
    return out


def load_moments(opt, moments):
    """Puts what whole_moments returned into an optimiser, of which a sharded one takes its own share."""
    local, index = getattr(opt, 'optim', opt), {w: i for i, w in enumerate(w for g in opt.param_groups for w in g['params'])}
    found = {}
    for key, value in moments.items():
        i, k = key.split('.')
        found.setdefault(int(i), {})[k] = value
    mine = [index[w] for g in local.param_groups for w in g['params']]
    local.load_state_dict(dict(local.state_dict(), state={j: found[i] for j, i in enumerate(mine) if i in found}))


def crc(file):
    """CRC-32 of a file: it finds what disks and copies do to files, which is all it is for, and costs less than SHA-256."""
    value = 0
    with open(file, 'rb') as f:
        while block := f.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def save_state(folder, it, nets, moments, args):
    """Writes folder/state-<it>: each network's trained weights and each optimiser's moments ({'student.opt': whole_moments(opt)}) as
    safetensors, and state.json with their sizes and checksums. The folder appears in one rename; the state before it is kept,
    older ones go."""
    from safetensors.torch import save_file
    folder = Path(folder)
    with replacing(folder / f'state-{it:07d}') as tmp:
        tmp.mkdir(parents=True)
        for name, tensors in ({name: trained(net) for name, net in nets.items()} | moments).items():
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, tmp / f'{name}.safetensors')
        files = {f.name: [f.stat().st_size, crc(f)] for f in tmp.iterdir()}
        (tmp / 'state.json').write_text(json.dumps(dict(iteration=it, args=args, files=files), indent=1))
    for old in states_of(folder)[:-2]:
        shutil.rmtree(old)


def states_of(folder):
    """The saved states in a run's folder, the newest last; what a kill left half-written (state-*.tmp) is none."""
    return sorted(Path(folder).glob('state-' + '[0-9]' * 7))


def damage(state):
    """What is wrong with a saved state's files, by the sizes and checksums in its state.json (which those of earlier versions
    do not have); '' for nothing."""
    try:
        for name, (size, check) in json.loads((state / 'state.json').read_text()).get('files', {}).items():
            if (state / name).stat().st_size != size or crc(state / name) != check:
                return f'{name} is not what was written'
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f'state.json or a file that it names cannot be read: {error}'
    return ''


def newest_sound(folder):
    """(the newest undamaged state in a run's folder or None, [(newer damaged state, what is wrong)]). Rank 0 looks, for all:
    reading everything once is enough, and ranks must not come to different answers."""
    state, damaged = None, []
    if os.environ.get('RANK', '0') == '0':
        for state in reversed(states_of(folder)):
            wrong = damage(state)
            if not wrong:
                break
            damaged.append((state, wrong))
            state = None
    found = [state, damaged]
    if dist.is_initialized():
        dist.broadcast_object_list(found, 0)
    return found


def load_state(folder, nets, opts, args, flag='--out', inherit=False):
    """Loads the newest sound folder/state-* into nets and opts; returns its iteration, or 0 where there is none.

    A damaged state is set aside (.damaged, until the next save) with a line; where there is no other, or it is one of another
    model, the run ends with a sentence. Settings that differ from the saved ones are printed, the command line wins.
    inherit=True is for a run of another kind: it changes nothing in the folder, loads what is there and returns the set of its
    files' names without .safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    state, damaged = newest_sound(folder)
    master, told = os.environ.get('RANK', '0') == '0', '; '.join(f'{path} is damaged ({wrong})' for path, wrong in damaged)
    if state is None:
        if damaged:
            die(f'{told}; there is no other: choose another {flag}, or delete it to start from the beginning')
        return set() if inherit else 0
    if master and damaged:
        print(f'{told}: going on from {state}', flush=True)
        for path, _ in [] if inherit else damaged:
            shutil.rmtree(f'{path}.damaged', ignore_errors=True)
            os.replace(path, f'{path}.damaged')
    way_out = f'delete {state} to go on from the state before it, or choose another {flag}'
    there = {f.name.removesuffix('.safetensors') for f in state.glob('*.safetensors')}
    wanted = {*nets, *(f'{name}.opt' for name in opts)} & there if inherit else {*nets, *(f'{name}.opt' for name in opts)}
    try:
        saved = json.loads((state / 'state.json').read_text())
        if saved['args']['model'] != args['model']:
            die(f'{flag} {folder} holds a run of --model {saved["args"]["model"]}, not {args["model"]}; choose another {flag}')
        for name in wanted & {*nets}:
            load_trained(nets[name], load_file(state / f'{name}.safetensors'))
        for name in [k for k in opts if f'{k}.opt' in wanted]:
            load_moments(opts[name], load_file(state / f'{name}.opt.safetensors'))
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError, ValueError):
        die(f'{state} cannot be read on every rank, or is not a state of this script; {way_out}')
    except RuntimeError as error:
        die(f'{state} does not fit these networks ({str(error).splitlines()[0]}); {way_out}')
    if inherit:
        return wanted
    if master:
        for key, value in saved['args'].items():
            if args.get(key, value) != value:
                print(f'--{key} is {args[key]} now, was {value}')
    return saved['iteration']


def on_cpu(net, dtype):
    """A frozen copy of net on the CPU with floating weights as dtype, without a second copy on net's own device."""
    memo = {id(w): nn.Parameter(w.detach().to('cpu', dtype), requires_grad=False) for w in net.parameters()}
    memo |= {id(b): b.detach().to('cpu', dtype if b.is_floating_point() else b.dtype) for b in net.buffers()}
    return copy.deepcopy(net, memo).eval()


def few_step_scheduler(scheduler, n):
    """The diffusers scheduler whose sampling is backward_simulation's, with its n steps: LCM's, or for a flow Euler's with
    fresh noise at every step (give the pipeline's call sigmas = (n, ..., 1) / n, which it shifts by itself)."""
    from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler
    if Schedule(scheduler).kind == 'flow':
        return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, stochastic_sampling=True)
    # with original_inference_steps = n LCMScheduler's own default is exactly 1000 / n * k - 1, the student's steps
    return LCMScheduler.from_config(scheduler.config, original_inference_steps=n)


def save_student(folder, base, student, steps, dtype, facts, lora=None):
    """Saves the student so that diffusers alone can use it, all weights as dtype: a pipeline folder with its own scheduler, or
    of a LoRA student (lora: its LoraConfig) the adapters and the scheduler. student.json has facts (its base model, iteration,
    prompts) and the steps."""
    scheduler = few_step_scheduler(base.pipe.scheduler, len(steps))
    with replacing(folder) as tmp:
        if lora:
            tmp.mkdir()
            # alpha / rank goes into the second factor: at scale 1, whatever a loader makes of alpha
            weights = {k.replace('.default', ''): (w.detach() * (lora.lora_alpha / lora.r if 'lora_B' in k else 1)).to('cpu', dtype)
                       for k, w in trained(student).items()}
            type(base.pipe).save_lora_weights(tmp, **{f'{base.part}_lora_layers': weights})
            scheduler.save_pretrained(tmp / 'scheduler')
        else:
            live = dict(base.pipe.components, scheduler=scheduler) | {base.part: student}
            parts = {k: on_cpu(v, dtype) if isinstance(v, nn.Module) else v for k, v in live.items()}
            settings = {k: v for k, v in base.pipe.config.items() if k == 'force_zeros_for_empty_prompt'}
            type(base.pipe)(**parts, **settings).save_pretrained(tmp)
        adapters = dict(lora=dict(rank=lora.r, alpha=lora.lora_alpha, targets=sorted(lora.target_modules))) if lora else {}
        (tmp / 'student.json').write_text(json.dumps(facts | adapters | dict(steps=steps.long().tolist()), indent=1))


def lora_file(folder, net, flag):
    """The adapters in a LoRA student's folder, {name in trained(net): tensor}, at scale 1; one sentence where they are missing,
    damaged, or do not fit net."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    file = Path(folder) / 'pytorch_lora_weights.safetensors'
    try:
        tensors = {k.split('.', 1)[1]: v for k, v in load_file(file).items()}                         # unet. or transformer.
    except (OSError, SafetensorError, IndexError) as error:
        die(f'{flag} {file} is missing, truncated or not a LoRA file ({error})')
    modules = dict(net.named_modules())
    for k, v in tensors.items():
        name, _, factor = k.removesuffix('.weight').rpartition('.lora_')
        size = modules[name].weight.shape[factor == 'A'] if name in modules else 0
        if v.shape[factor == 'A'] != size:
            die(f'{flag} {file} is of another base model: its {k}, {tuple(v.shape)}, does not fit')
    return tensors


def restore_student(net, folder, lora, flag='--init'):
    """Puts the weights that save_student wrote into net, a copy of its base model's network, with adapters where lora says so."""
    if lora is None:
        part = next(part for part in Base.FAMILIES.values() if Path(folder, part).exists())
        return net.load_state_dict(type(net).from_pretrained(folder, subfolder=part, dtype=torch.float32).state_dict())
    scale = lora.lora_alpha / lora.r
    load_trained(net, {k.replace('.weight', '.default.weight'): v.float() / (scale if 'lora_B' in k else 1)
                       for k, v in lora_file(folder, net, flag).items()})


def load_student(folder, facts, dtype, flag='--ckpt'):
    """A student's pipeline with its own scheduler: the saved one, or its base model with the adapters on it."""
    if not facts.get('lora'):
        return load_pipeline(folder, flag, dtype)
    pipe = load_pipeline(facts['base_model'], f'{flag} {folder}: its base model', dtype, facts.get('t5'))
    part = Base.FAMILIES.get(type(pipe).__name__, 'unet')
    lora_file(folder, getattr(pipe, part), flag)
    pipe.load_lora_weights(folder)
    pipe.scheduler = few_step_scheduler(pipe.scheduler, len(facts['steps']))
    return pipe


def find_student(ckpt, flag='--ckpt', runs=('out/stage2', 'out/stage1')):
    """The folder of a student and its facts (student.json): `ckpt` is a run's folder or the pipeline folder;
    empty means the newest of `runs`, else the shipped one."""
    shipped = Path(os.path.relpath(Path(__file__).parent / 'assets/toy/student'))
    if ckpt:
        places = [Path(ckpt) / 'student', Path(ckpt)]
    else:
        students = [Path(run) / 'student' for run in runs]
        places = [r for r in students if (r / 'student.json').exists()]
        places.sort(key=lambda r: -(r / 'student.json').stat().st_mtime)
        places.append(shipped)
    for place in places:
        if (place / 'student.json').exists():
            try:
                facts = json.loads((place / 'student.json').read_text())
                kinds = dict(base_model=str, recipe=str, iteration=int, steps=list, prompts=list)
                lists = [('steps', (int, float)), ('prompts', str)]
                if all(isinstance(facts[k], kind) for k, kind in kinds.items()) and all(
                        facts[k] and all(isinstance(x, kind) for x in facts[k]) for k, kind in lists):
                    if facts.get('lora') is not None:
                        assert facts['lora']['rank'] > 0 and facts['lora']['alpha'] > 0 and list(facts['lora']['targets'])
                    home = Path(__file__).parent / facts['base_model']
                    if home.exists() and not Path(facts['base_model']).exists():            # started from another folder
                        facts['base_model'] = os.path.relpath(home)
                    return place, facts
            except (OSError, ValueError, KeyError, TypeError, RecursionError, AssertionError):
                pass
            die(f'{flag} {place} is damaged: its student.json cannot be read, or lacks what train_stage1.py writes there')
    die(f'{flag} {ckpt or shipped} holds no student (no student.json); give the folder of a training run')


# ---------------------------------------------------------------------------------------------------------------------
# sampling with diffusers' own pipelines, for sample.py and evaluate.py


def compile_pipeline(pipe):
    """torch.compile for a pipeline's network and its VAE's decoder, one graph each for every size of batch."""
    part = pipe.transformer if hasattr(pipe, 'transformer') else pipe.unet
    part.compile(fullgraph=True, dynamic=False)
    pipe.vae.decode = torch.compile(pipe.vae.decode, fullgraph=True, dynamic=False)


@torch.no_grad()
def generate(pipe, prompts, indices, seed, steps, cfg):
    """Pictures (B, 3, H, W) in [0, 1], float32 on the CPU, one per prompt. The noise of a picture depends on (seed, its
    index) alone, not on the batch. A student's pipeline takes `steps` evenly spaced steps and no guidance, any other its
    scheduler's own with guidance cfg."""
    how, streams = dict(num_inference_steps=steps, guidance_scale=cfg), [generator(seed, int(i)) for i in indices]
    if type(pipe.scheduler).__name__ == 'LCMScheduler':
        how = dict(timesteps=Schedule(pipe.scheduler).steps(steps).long().tolist(), guidance_scale=0.)
    elif pipe.scheduler.config.get('stochastic_sampling'):
        how = dict(sigmas=[k / steps for k in range(steps, 0, -1)], num_inference_steps=steps, guidance_scale=0.)
        # SD3's pipeline does not hand its generators on to the scheduler
        pipe.scheduler.step = functools.partial(type(pipe.scheduler).step, pipe.scheduler, generator=streams)
    return pipe(list(prompts), generator=streams, output_type='pt', **how, **text_length(pipe)).images.float().cpu()


# ---------------------------------------------------------------------------------------------------------------------
# pictures to look at


def picture_grid(rows, captions, path, labels=None):
    """Writes a PNG of rows of pictures, captions under the columns and a label before each row.

    rows: list of (n, 3, H, W) in [-1, 1]; captions: n strings; labels: one string per row. A single row is folded into
    several of at most 8 columns.
    """
    rows = [[Image.fromarray(((p.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
             for p in row] for row in rows]
    side = max(128, min(512, rows[0][0].width))
    font = ImageFont.load_default(12)
    wrapped = [textwrap.wrap(c, side // 7)[:4] for c in captions]
    columns = len(captions) if len(rows) > 1 else min(8, len(captions))
    left, foot = (70 if labels else 0), 4 + 15 * max(map(len, wrapped))
    bands = [range(k, min(k + columns, len(captions))) for k in range(0, len(captions), columns)]
    height = (len(rows) * (side + 2) + foot) * len(bands)
    sheet = Image.new('RGB', (left + columns * (side + 2), height), 'white')
    pen, y = ImageDraw.Draw(sheet), 0
    for band in bands:
        for r, row in enumerate(rows):
            if labels:
                pen.multiline_text((2, y + side // 2 - 12), labels[r], 'black', font)
            for x, k in enumerate(band):
                sheet.paste(row[k].resize((side, side), Image.NEAREST if row[k].width < side else Image.LANCZOS),
                            (left + x * (side + 2), y))
            y += side + 2
        for x, k in enumerate(band):
            pen.multiline_text((left + x * (side + 2) + 2, y), '\n'.join(wrapped[k]), 'black', font, spacing=2)
        y += foot
    with replacing(path) as tmp:
        sheet.save(tmp, 'PNG')


def curves(log, path):
    """Draws every column of a log.jsonl against the iteration, one panel for each group, as a PNG."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    rows = [json.loads(line) for line in Path(log).read_text().splitlines()]
    groups = {}
    for name in sorted({k for row in rows for k in row} - {'iteration', 'dropped', 'skipped', 'memory'}):
        groups.setdefault(name.split('/')[0], []).append(name)
    figure, axes = plt.subplots(2, (len(groups) + 1) // 2 or 1, figsize=(12, 6), squeeze=False, layout='constrained')
    for axis, (group, names) in zip(axes.flat, groups.items()):
        for name in names:
            points = [(row['iteration'], row[name]) for row in rows if name in row]
            axis.plot(*zip(*points), label=name)
        axis.set_xlabel('iteration'), axis.legend(fontsize=8)
        if group in ('grad', 'norm'):
            axis.set_yscale('log')
    with replacing(path) as tmp:
        figure.savefig(tmp, format='png', dpi=100)
    plt.close(figure)
