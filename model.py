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
import io
import json
import os
import pickle
import shutil
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------------------------------------------------
# errors and files


def die(message):
    """Ends the run with one sentence for the user and exit code 2 (one line per machine, not one per rank)."""
    if os.environ.get('LOCAL_RANK', '0') == '0':
        print(f'error: {message}', file=sys.stderr, flush=True)
    sys.exit(2)


def parser(doc):
    """An ArgumentParser for a script: the docstring as help, no abbreviated flags, errors in one line."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                   allow_abbrev=False, usage='%(prog)s [--flag value ...], see --help')


def at_least(args, **least):
    """Ends with a sentence for the first flag in args that is below its least value."""
    for flag, value in least.items():
        if getattr(args, flag) < value:
            die(f'--{flag} {getattr(args, flag)} must be at least {value}')


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
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary path beside `path`, a file or a folder; on success it takes path's place in one rename, on any
    error what stood there stays."""
    path = Path(path)
    temporary = path.with_name(f'{path.name}.tmp{path.suffix}')

    def remove(p):
        shutil.rmtree(p) if p.is_dir() else p.unlink(missing_ok=True)

    remove(temporary)
    try:
        yield temporary
        if path.is_dir():                            # a folder cannot be renamed onto another that is not empty
            old = path.with_name(path.name + '.old')
            remove(old)
            os.replace(path, old)
            os.replace(temporary, path)
            remove(old)
        else:
            os.replace(temporary, path)
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
        if self.kind == 'flow':
            return (1000 * self.shift * u / (1 + (self.shift - 1) * u)).float()
        return (1000 * u - 1).round().float()

    def low_noise(self, t):
        """True where SNR >= 1, the steps of the pixel GAN; t (B,). SNR is exactly 1 at SD3's last step, t = 500."""
        return self.snr(t) >= 1 - 1e-6

    def between(self, u, low, high):
        """Uniforms u in [0, 1) -> times t in [low, high], whole numbers where the schedule is a table."""
        return low + (high - low) * u if self.kind == 'flow' else (low + (high - low + 1) * u).floor()


# ---------------------------------------------------------------------------------------------------------------------
# the base model: a diffusers pipeline taken apart


def load_pipeline(name, flag, dtype):
    """DiffusionPipeline from a folder or a hub id; ends with one sentence when there is none. dtype as diffusers takes it."""
    import diffusers
    quiet()
    if Path(name).exists() and not (Path(name) / 'model_index.json').exists():
        die(f'{flag} {name} is not a diffusers pipeline folder (it has no model_index.json)')
    if not Path(name).exists() and (str(name).count('/') != 1 or str(name)[0] in './~'):
        die(f'{flag} {name} does not exist')
    try:
        return diffusers.DiffusionPipeline.from_pretrained(str(name), dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, json.JSONDecodeError) as error:
        reason = ' '.join(str(error).split())[:300]
        if Path(name).exists():
            die(f'{flag} {name} is damaged or not a pipeline of safetensors files: {reason}')
        die(f'{flag} {name} could not be downloaded; {flag} assets/toy/sdxl runs offline ({reason})')


class Base:
    """A pretrained text-to-image pipeline: text encoders, VAE, schedule and the frozen teacher network.

    Networks are called as base.x0(net, xt, t, y, cfg) or base.predict(net, xt, t, y), where net is the teacher or any
    copy of it, xt (B, C, H, W) latents, t (B,) and y = base.encode(prompts). dtype is the teacher's and the text
    encoders'; the VAE stays in fp32, because SDXL's overflows in fp16.
    """

    def __init__(self, name, flag='--model', device='cpu', dtype=torch.float32):
        self.name, self.device = str(name), torch.device(device)
        self.pipe = load_pipeline(name, flag, {'vae': torch.float32, 'default': dtype})
        family = type(self.pipe).__name__
        if family != 'StableDiffusionXLPipeline':
            die(f'{flag} {name} is a {family}; this version distils StableDiffusionXLPipeline models')
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.to(device)
        self.teacher, self.vae = self.pipe.unet.eval(), self.pipe.vae.eval()
        for net in (self.teacher, self.vae, self.pipe.text_encoder, self.pipe.text_encoder_2):
            net.requires_grad_(False)
        self.schedule = Schedule(self.pipe.scheduler)
        self.size = self.teacher.config.sample_size * self.pipe.vae_scale_factor           # pixels
        self.latent_shape = (self.teacher.config.in_channels,) + (self.teacher.config.sample_size,) * 2
        self.uncond = self._encode([''], empty=True)

    def trainable(self):
        """A copy of the teacher with fp32 weights of its own, read from the files, not from the bf16 teacher."""
        net = type(self.teacher).from_pretrained(self.name, subfolder='unet', dtype=torch.float32)
        return net.to(self.device).train()

    @torch.no_grad()
    def _encode(self, prompts, empty=False):
        # with empty=True the pipeline's own negative: zeros for SDXL (force_zeros_for_empty_prompt), else the encoded ''
        e, n, pe, pn = self.pipe.encode_prompt(prompts, device=self.device, do_classifier_free_guidance=empty)
        return (n, pn) if empty else (e, pe)

    def encode(self, prompts):
        """List of B strings -> y = (embeddings (B, L, D), pooled (B, P)), without gradient."""
        return self._encode(list(prompts))

    def autocast(self):
        """bf16 autocast on CUDA, nothing elsewhere."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == 'cuda')

    def predict(self, net, xt, t, y):
        """net's own output at (xt, t) under y, (B, C, H, W) float32; bf16 autocast inside on CUDA."""
        sizes = torch.tensor([self.size, self.size, 0, 0, self.size, self.size], device=xt.device)
        with self.autocast():
            out = net(xt, t, encoder_hidden_states=y[0],
                      added_cond_kwargs=dict(text_embeds=y[1], time_ids=sizes.expand(len(xt), 6))).sample
        return out.float()

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
        dtype = self.teacher.dtype
        z = self.pipe(list(prompts), num_inference_steps=steps, guidance_scale=cfg, latents=noise.to(self.device, dtype),
                      height=self.size, width=self.size, output_type='latent').images
        return self.decode(z.float())


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
    """psi <- c psi + (1 - c) theta on the fake score's live weights (Flash-DMD eq. 11); c = 1 leaves it alone."""
    if c < 1:
        torch._foreach_lerp_(list(fake.parameters()), list(student.parameters()), 1 - c)


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


def bottleneck(base, net, xt, t, y):
    """The mid block's output (B, C, h, w) of a UNet at (xt, t, y); the up path is not computed. net must be the bare
    module, not its DDP wrapper."""
    caught = []

    def stop(module, inputs, output):
        caught.append(output)
        raise _Stop

    hook = net.mid_block.register_forward_hook(stop)
    try:
        base.predict(net, xt, t, y)
    except _Stop:
        pass
    finally:
        hook.remove()
    return caught[0].float()


# ---------------------------------------------------------------------------------------------------------------------
# data


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
        self.image_column, self.text_path, self.size, self.seed = image_column, text_column.split('.'), size, seed
        self.epoch, self.order = None, None

    def __getitem__(self, position):
        epoch, place = divmod(position, len(self.rows))
        if epoch != self.epoch:
            self.order = torch.randperm(len(self.rows), generator=generator(self.seed, 1, epoch))
            self.epoch = epoch
        for skipped in range(min(len(self.rows), 1000)):
            row = self.rows[int(self.order[(place + skipped) % len(self.rows)])]
            pixels, text = self._pixels(row[self.image_column]), row
            for key in self.text_path:
                text = text[key] if isinstance(text, dict) else text
            text = text[0] if isinstance(text, list) and text else text
            if pixels is not None and isinstance(text, str):
                return dict(pixels=pixels, text=text, skipped=skipped)
        raise RuntimeError(f'data: {skipped + 1} rows in a row without a readable picture of {self.size // 2} px and a caption')

    def _pixels(self, record):
        try:
            image = Image.open(io.BytesIO(record['bytes']) if record['bytes'] else record['path'])
            if min(image.size) < self.size / 2:
                return None
            image = ImageOps.fit(image.convert('RGB'), (self.size, self.size), Image.LANCZOS)
        except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError):
            return None
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1

    def batches(self, batch, rank, world, start, stop, workers):
        """A DataLoader of this rank's share of the batches start..stop - 1; decoding runs in worker processes."""
        mine = range(rank * batch // world, (rank + 1) * batch // world)
        # fork, since a spawned worker would run the training script again from its first line; on a Mac, where forking
        # is not safe, the pictures are decoded in the main process
        workers = 0 if sys.platform == 'darwin' else workers
        return torch.utils.data.DataLoader(
            self, batch_size=len(mine), sampler=[it * batch + i for it in range(start, stop) for i in mine],
            num_workers=workers, multiprocessing_context='fork' if workers else None, pin_memory=torch.cuda.is_available())


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints


def save_state(folder, it, nets, opts, args):
    """Writes folder/state-<it>: each network's weights and each optimiser's moments as safetensors, and state.json. The
    folder appears in one rename; the state before it is kept, older ones go."""
    from safetensors.torch import save_file
    folder = Path(folder)
    with replacing(folder / f'state-{it:07d}') as tmp:
        tmp.mkdir(parents=True)
        for name, net in nets.items():
            save_file({k: v.contiguous() for k, v in net.state_dict().items()}, tmp / f'{name}.safetensors')
        for name, opt in opts.items():
            state = opt.state_dict()['state']
            save_file({f'{i}.{k}': v.contiguous() for i, s in state.items() for k, v in s.items()},
                      tmp / f'{name}.opt.safetensors')
        (tmp / 'state.json').write_text(json.dumps(dict(iteration=it, args=args), indent=1))
    for old in sorted(folder.glob('state-' + '[0-9]' * 7))[:-2]:
        shutil.rmtree(old)


def load_state(folder, nets, opts, args):
    """Loads the newest complete folder/state-* into nets and opts; returns its iteration, or 0 where there is none.

    Half-written states (state-*.tmp) are ignored. A damaged state or one of another model ends with a sentence. Settings
    that differ from the saved ones are printed, the command line wins.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    states = sorted(Path(folder).glob('state-' + '[0-9]' * 7))
    if not states:
        return 0
    state = states[-1]
    way_out = f'delete {state} to go on from the state before it, or choose another --out'
    try:
        saved = json.loads((state / 'state.json').read_text())
        if saved['args']['model'] != args['model']:
            die(f'--out {folder} holds a run of --model {saved["args"]["model"]}, not {args["model"]}; choose another --out')
        for name, net in nets.items():
            net.load_state_dict(load_file(state / f'{name}.safetensors'))
        for name, opt in opts.items():
            fresh, moments = opt.state_dict(), {}
            for key, value in load_file(state / f'{name}.opt.safetensors').items():
                i, k = key.split('.')
                moments.setdefault(int(i), {})[k] = value
            opt.load_state_dict(dict(fresh, state=moments))
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError, ValueError):
        die(f'{state} is truncated or not a state of this script; {way_out}')
    except RuntimeError as error:
        die(f'{state} does not fit these networks ({str(error).splitlines()[0]}); {way_out}')
    if os.environ.get('RANK', '0') == '0':
        for key, value in saved['args'].items():
            if args.get(key, value) != value:
                print(f'--{key} is {args[key]} now, was {value}')
    return saved['iteration']


def on_cpu(net, dtype):
    """A frozen copy of net on the CPU with floating weights as dtype, without a second copy on net's own device."""
    memo = {id(w): nn.Parameter(w.detach().to('cpu', dtype), requires_grad=False) for w in net.parameters()}
    memo |= {id(b): b.detach().to('cpu', dtype if b.is_floating_point() else b.dtype) for b in net.buffers()}
    return copy.deepcopy(net, memo).eval()


def save_student(folder, base, student, steps, dtype, facts):
    """Saves the student as a pipeline folder that diffusers alone can use: LCMScheduler set to the student's own steps,
    all weights as dtype, and student.json with facts (its base model, iteration, prompts)."""
    from diffusers import LCMScheduler
    # with original_inference_steps = n LCMScheduler's own default is exactly 1000 / n * k - 1, the student's steps
    n = len(steps)
    scheduler = LCMScheduler.from_config(base.pipe.scheduler.config, original_inference_steps=n)
    scheduler.set_timesteps(n)
    assert scheduler.timesteps.tolist() == steps.long().tolist(), f'{scheduler.timesteps} are not the steps {steps}'
    live = dict(base.pipe.components, unet=student, scheduler=scheduler)
    parts = {k: on_cpu(v, dtype) if isinstance(v, nn.Module) else v for k, v in live.items()}
    pipe = type(base.pipe)(**parts, **{k: v for k, v in base.pipe.config.items() if k == 'force_zeros_for_empty_prompt'})
    with replacing(folder) as tmp:
        pipe.save_pretrained(tmp)
        (tmp / 'student.json').write_text(json.dumps(dict(facts, steps=steps.long().tolist()), indent=1))


def find_student(ckpt):
    """The pipeline folder of a student and its facts (student.json): `ckpt` is a run's folder or the pipeline folder;
    empty means the newest of out/stage2 and out/stage1, else the shipped one."""
    shipped = Path(os.path.relpath(Path(__file__).parent / 'assets/toy/student'))
    if ckpt:
        places = [Path(ckpt) / 'student', Path(ckpt)]
    else:
        runs = [Path(run) / 'student' for run in ('out/stage2', 'out/stage1')]
        places = sorted((r for r in runs if (r / 'student.json').exists()), key=lambda r: -(r / 'student.json').stat().st_mtime)
        places.append(shipped)
    for place in places:
        if (place / 'student.json').exists():
            try:
                return place, json.loads((place / 'student.json').read_text())
            except (OSError, ValueError):
                die(f'--ckpt {place} is damaged: its student.json cannot be read')
    die(f'--ckpt {ckpt or shipped} holds no student (no student.json); give the folder of a training run')


# ---------------------------------------------------------------------------------------------------------------------
# sampling with diffusers' own pipelines, for sample.py and evaluate.py


@torch.no_grad()
def generate(pipe, prompts, indices, seed, steps, cfg):
    """Pictures (B, 3, H, W) in [0, 1], float32 on the CPU, one per prompt. The noise of a picture depends on (seed, its
    index) alone, not on the batch. A student's pipeline (LCMScheduler) takes `steps` evenly spaced steps and no guidance,
    any other its scheduler's own with guidance cfg."""
    few = type(pipe.scheduler).__name__ == 'LCMScheduler'
    how = dict(timesteps=Schedule(pipe.scheduler).steps(steps).long().tolist(), guidance_scale=0.) if few else dict(
        num_inference_steps=steps, guidance_scale=cfg)
    return pipe(list(prompts), generator=[generator(seed, int(i)) for i in indices], output_type='pt',
                **how).images.float().cpu()


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
