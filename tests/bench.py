"""
Speed and memory of training and of evaluation.

    python tests/bench.py            # the toy on the CPU; with CUDA SDXL's size, random weights
    python tests/bench.py --only evaluate

memory    GB on each card at 1024 px by the arithmetic of the scripts' plan (model.gigabytes), and
          the sizes in it counted anew on meta tensors: parameters, activations, decoding
ranks     a UNet of 293 M random parameters on all ranks, under torchrun or alone: main memory at
          rest and at most beside the arithmetic, and CPU seconds of rank 0 in a save
work      TFLOP of an iteration at 1024 px and of drawing a picture, counted on meta tensors
train     seconds per iteration of train_stage1.py, started as a user would, beside the sum of the
          network passes that it cannot avoid, timed one by one (goal: ratio <= 1.05)
sample    seconds per picture of 4 steps by plain diffusers and by sample.py, and of the teacher's
          50 steps with guidance
evaluate  pictures per second of evaluate.py on the toy: drawing, each score, and the share of the
          scoring that is spent outside the networks (goal: <= 5 %)
"""

import argparse
import contextlib
import gc
import json
import os
import shutil
import subprocess
import sys
import time
import weakref
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
import torch.utils._python_dispatch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import model as m                                                                      # noqa: E402

cuda = torch.cuda.is_available()
device = torch.device('cuda' if cuda else 'cpu')

# --------------------------------------------------------------------------------------------------
# the published models' sizes

UNET = dict(
    sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2,
    attention_head_dim=[5, 10, 20], transformer_layers_per_block=[1, 2, 10],
    down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'),
    up_block_types=('CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'),
    cross_attention_dim=2048, addition_embed_type='text_time', addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816, use_linear_projection=True)
MMDIT = dict(
    sample_size=128, num_layers=24, num_attention_heads=24, attention_head_dim=64,
    joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
    pos_embed_max_size=192)
VAE = dict(
    sample_size=1024, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
    down_block_types=['DownEncoderBlock2D'] * 4, up_block_types=['UpDecoderBlock2D'] * 4)
VAE_OF = dict(
    sdxl=VAE | dict(latent_channels=4, scaling_factor=.13025),
    sd3=VAE | dict(latent_channels=16, scaling_factor=1.5305, shift_factor=.0609,
                   use_quant_conv=False, use_post_quant_conv=False))

def clip_text(width, layers):
    from transformers import CLIPTextConfig
    return CLIPTextConfig(
        vocab_size=49408, eos_token_id=2, bos_token_id=0, hidden_size=width,
        intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64,
        projection_dim=width)

def qwen():
    """Qwen-Image's, as diffusers has them by default, and Qwen2.5-VL-7B."""
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    text = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
            num_attention_heads=28, num_key_value_heads=4,
            rope_scaling=dict(type='mrope', mrope_section=[16, 24, 24])),
        vision_config=dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16,
                           out_hidden_size=3584), tie_word_embeddings=False)
    return dict(
        transformer=QwenImageTransformer2DModel(), vae=AutoencoderKLQwenImage(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(text))

def zimage():
    """Z-Image's as diffusers has it by default, a VAE of SD3's shape and Qwen3-4B."""
    from diffusers import AutoencoderKL, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model
    text = Qwen3Config(
        vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128)
    return dict(transformer=ZImageTransformer2DModel(), vae=AutoencoderKL(**VAE_OF['sd3']),
                text_encoder=Qwen3Model(text))

def networks(family):
    """SDXL-base's, SD3-Medium's, Qwen-Image's or Z-Image's networks by their places in a pipeline,
    random weights."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
    if family in ('qwen', 'zimage'):
        return dict(qwen=qwen, zimage=zimage)[family]()
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel
    vae = AutoencoderKL(**VAE_OF[family])
    second = CLIPTextModelWithProjection(clip_text(1280, 32))
    if family == 'sdxl':
        return dict(unet=UNet2DConditionModel(**UNET), vae=vae,
                    text_encoder=CLIPTextModel(clip_text(768, 12)), text_encoder_2=second)
    t5 = T5EncoderModel(T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
        feed_forward_proj='gated-gelu'))
    first = CLIPTextModelWithProjection(clip_text(768, 12))
    return dict(transformer=SD3Transformer2DModel(**MMDIT), vae=vae, text_encoder=first,
                text_encoder_2=second, text_encoder_3=t5)

def meta_base(family):
    """(model.Base of that size on the meta device, bf16, with embeddings of an empty prompt in name
    only; its text encoders)."""
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
    kind, tokens, width, pooled = dict(
        sdxl=(m.SDXL, 77, 2048, 1280), sd3=(m.SD3, 333, 4096, 2048),
        qwen=(m.QwenImage, 128, 3584, 128),                      # the last: a mask of the tokens
        zimage=(m.ZImage, 128, 2560, 1))[family]
    scheduler = DDPMScheduler() if family == 'sdxl' else FlowMatchEulerDiscreteScheduler(shift=3.)
    base = kind.__new__(kind)
    base.schedule = m.Schedule(scheduler)
    base.size = 1024
    base.device = torch.device('meta')
    base.autocast = contextlib.nullcontext                   # it does not know the meta device
    base.latent_shape = (4 if family == 'sdxl' else 16, 128, 128)
    with torch.device('meta'):
        parts = networks(family)
        base.teacher = parts.pop(base.part).to(torch.bfloat16)
        base.vae = parts.pop('vae').requires_grad_(False)
        base.uncond = [torch.empty(1, tokens, width, dtype=torch.bfloat16),
                       torch.empty(1, pooled, dtype=torch.bfloat16)]
    if family == 'qwen':
        base.vae.enable_gradient_checkpointing = lambda: m.checkpoint_decoder(base.vae)
    if family == 'zimage':
        base.uncond[1] = torch.tensor([[tokens]])                       # lengths, which are read
    return base, parts

def meta_student(base, lora):
    """The teacher itself, which is trained, or adapters of this rank on it."""
    if not lora:
        return base.teacher
    base.teacher.requires_grad_(False)
    with torch.device('meta'):
        return base.trainable(m.lora_config(base.teacher, lora, 2. * lora, 'attention'))

def meta_heads():
    """The pixel discriminator on vit_b, with checkpointing."""
    from segment_anything import build_sam_vit_b
    with torch.device('meta'):
        encoder = m.build_sam_encoder(build_sam_vit_b().state_dict())
        return m.PixelDiscriminator(encoder, 1024, checkpointing=True)

def count(*nets):
    return sum(w.numel() for net in nets for w in net.parameters())

# --------------------------------------------------------------------------------------------------
# memory

class Live(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the bytes of the storages that come to be inside, now and at most."""

    def __init__(self, before):
        super().__init__()
        self.now = self.most = 0
        self.known = {w.untyped_storage()._cdata for w in before}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in torch.utils._pytree.tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage is None or storage._cdata in self.known:
                continue
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return out

    def gone(self, key, size):
        self.known.discard(key)
        self.now -= size

class Flash(torch.autograd.Function):
    """Attention that keeps q, k, v and its answer, as on CUDA; the meta device would keep the
    matrix."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])

def activations(family, lora=0, crop=1024, n=1, checkpointing=True, gan=True):
    """GB at the peak of one student update of n samples beyond the weights: the passes of
    train_stage1.py's steps 1 to 3, on the meta device."""
    base, _ = meta_base(family)
    disc = meta_heads()
    student = meta_student(base, lora).to(torch.bfloat16)
    disc.checkpointing = checkpointing
    if checkpointing:
        student.enable_gradient_checkpointing()
        base.vae.enable_gradient_checkpointing()
    x = torch.empty(n, *base.latent_shape, dtype=torch.bfloat16, device='meta')
    t = torch.full((n,), 500., device='meta')
    y = [v.repeat_interleave(n, 0) for v in base.uncond]
    for w in m.trained(student).values():                   # counted with the optimiser, not here
        w.register_post_accumulate_grad_hook(lambda w: setattr(w, 'grad', None))
    nets = student, base.teacher, base.vae, disc
    before = [w for net in nets for w in net.parameters()] + list(student.buffers())
    attention = mock.patch.object(
        F, 'scaled_dot_product_attention',
        lambda query, key, value, *_, **how: Flash.apply(query, key, value))
    with attention, Live(before) as live:
        x0 = base.x0(student, x, t, y)
        z = base.x0(student, x, t, y)
        with torch.no_grad():
            base.x0(base.teacher, x, t, y, 7.)
        push = torch.zeros_like(z)
        if gan:
            leaf = z.detach().requires_grad_()
            logits = disc(base.decode(leaf[..., :crop // 8, :crop // 8]))
            push, = torch.autograd.grad(logits.mean(), leaf)
        torch.autograd.backward([x0, z], [push, push])
    return live.most / 1e9

def settings(family, **flags):
    """A training script's settings, as far as model.gigabytes reads them."""
    flags = dict(recipe=family, model='hub/id', lora=0, fake_lora=0, micro=1, t5=None,
                 offload=False, gan='pixel', gan_crop=0, grad_checkpointing=True, cpu_offload=False,
                 save_dtype='float16') | flags
    return argparse.Namespace(**flags)

def memory(args):
    """Prints the table of GB on each card, and the sizes in it beside what is counted."""
    print('| | cards | frozen | trained | activations | GB | with `--gan_crop 512` | of a state |\n'
          '|---|---|---|---|---|---|---|---|')
    for label, family, flags, worlds in [
            ('SDXL, all weights', 'sdxl', {}, (1, 2, 4, 8, 16)),
            ('SDXL, all weights, `--micro 2`', 'sdxl', dict(micro=2), (2, 4, 8)),
            ('SDXL, all weights, `--micro 4`', 'sdxl', dict(micro=4), (8,)),
            ('SDXL, all weights, `--cpu_offload`', 'sdxl', dict(cpu_offload=True), (1,)),
            ('SDXL, all weights, `--cpu_offload --micro 4`', 'sdxl',
             dict(cpu_offload=True, micro=4), (1,)),
            ('SDXL, stage 2', 'sdxl',
             dict(rl_ratio=5, rl='pairs', joint=True, reward='latent'), (8,)),
            ('SDXL, `--lora 64`', 'sdxl', dict(lora=64), (1,)),
            ('SD3-Medium, `--lora 64`', 'sd3', dict(lora=64), (1,)),
            ('SD3-Medium, `--lora 64 --no-t5`', 'sd3', dict(lora=64, t5=False), (1,)),
            ('SD3-Medium, `--lora 64 --offload`', 'sd3', dict(lora=64, offload=True), (1,)),
            ('SD3-Medium, all weights', 'sd3', {}, (8,)),
            ('Qwen-Image, `--lora 32 --offload`', 'qwen', dict(lora=32, offload=True), (1,)),
            ('Qwen-Image, `--lora 32 --offload --gan none`', 'qwen',
             dict(lora=32, offload=True, gan='none'), (1,)),
            ('Z-Image, `--lora 32`', 'zimage', dict(lora=32), (1,)),
            ('Z-Image, `--lora 32 --offload`', 'zimage', dict(lora=32, offload=True), (1,)),
            ('Z-Image, `--lora 32 --offload --gan none`', 'zimage',
             dict(lora=32, offload=True, gan='none'), (1,))]:
        for world in worlds:
            need, cut = (m.gigabytes(settings(family, gan_crop=crop, **flags), world, world, True)
                         for crop in (0, 512))
            held = need['frozen'] + need['trained']
            print(f'| {label} | {world} | {need["frozen"]:.1f} | {need["trained"]:.1f} | '
                  f'{need["activations"]:.1f} | {held + need["activations"]:.1f} | '
                  f'{held + cut["activations"]:.1f} | {need["state"]:.1f} |')
    for name, used, counted in sizes(families=m.SIZES):
        print(f'{name:46s} {used:8.3f} {counted:8.3f}', flush=True)

# of a student update: pixels of the crop, samples, checkpointing, GAN
UPDATES = [(1024, 1, True, 'pixel'), (512, 2, True, 'pixel'), (512, 1, True, 'pixel'),
           (1024, 1, False, 'pixel'), (1024, 1, True, 'none')]

def sizes(updates=UPDATES, families=('sdxl', 'sd3')):
    """(name, as model.gigabytes has it, counted), in 1e9 parameters or GB; an iterator."""
    for family in families:
        size = dict(vae=m.VAE, look=m.LOOK) | m.SIZES[family]
        lora = 0 if family == 'sdxl' else 64
        base, texts = meta_base(family)
        yield f'{family}: network', size['net'] / 1e9, count(base.teacher) / 1e9
        yield f'{family}: VAE', size['vae'] / 1e9, count(base.vae) / 1e9
        t5 = count(texts.pop('text_encoder_3')) if 'text_encoder_3' in texts else 0
        yield f'{family}: T5', size['t5'] / 1e9, t5 / 1e9
        yield f'{family}: text encoders', size['texts'] / 1e9, count(*texts.values()) / 1e9
        own = sum(w.numel() for w in m.trained(meta_student(base, 64)).values())
        yield f'{family}: adapters of rank 64', size['adapters'] * 64 / 1e9, own / 1e9
        for crop, n, checkpointing, gan in updates:
            flags = settings(family, lora=lora, gan_crop=crop, micro=n, gan=gan,
                             grad_checkpointing=checkpointing)
            used = m.gigabytes(flags, 1, 1, True)['activations']
            found = activations(family, lora, crop, n, checkpointing, gan == 'pixel')
            found = max(found, size['look'] + .4 * n)         # of a sample grid
            yield (f'{family}: {gan} {crop} px, micro {n}, '
                   f'{"" if checkpointing else "no "}checkpointing', used, found)
    heads = meta_heads()
    yield "SAM's vit_b", m.SAM / 1e9, count(heads.encoder) / 1e9
    yield 'its heads', m.HEADS / 1e9, count(heads.heads) / 1e9
    base, _ = meta_base('sdxl')
    with Live([*base.vae.parameters()]) as live, torch.no_grad():
        base.decode(torch.empty(1, *base.latent_shape, device='meta'))
    yield 'decoding a picture, fp32', m.LOOK, live.most / 1e9
    # of FSDP2: the root, three layers, a layer's gradient in bf16 and its reduction in fp32
    layers = [count(layer) for layer in base.teacher.modules() if type(layer).__name__ in m.BLOCKS]
    root = count(base.teacher) - sum(layers)
    flight = 2 * (root + 3 * max(layers)) + 2 * max(layers) + 4 * max(layers)
    yield 'layers in flight', m.FLIGHT, flight / 1e9
    for name in base.second_half:
        setattr(base.teacher, name, None)
    _, texts = meta_base('sdxl')
    yield 'latent reward, bf16', 4.1, 2 * count(base.teacher, *texts.values()) / 1e9

def held(what):
    """A figure of this process's main memory in GB: VmRSS, now, or VmHWM, at most."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) / 1e6 for line in lines if line.startswith(what))

def ranks(args):
    """Prints a rank's main memory at rest, after a backward pass and at most, beside the arithmetic
    of the plan, and rank 0's CPU seconds in a save."""
    from diffusers import UNet2DConditionModel
    rank, world, where = m.launch(5)
    shape = dict(UNET, block_out_channels=(160, 320, 640), attention_head_dim=[5, 10, 20],
                 sample_size=8, cross_attention_dim=64, addition_time_embed_dim=8,
                 projection_class_embeddings_input_dim=112, transformer_layers_per_block=[1, 2, 4])
    torch.manual_seed(0)
    x, y = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 64)
    extra = dict(text_embeds=torch.randn(1, 64), time_ids=torch.zeros(1, 6))

    def learn(net):
        net(x, timestep=torch.tensor([500.]), encoder_hidden_states=y,
            added_cond_kwargs=extra).sample.square().mean().backward()

    small = UNet2DConditionModel(**dict(shape, block_out_channels=(32, 32, 32)))
    learn(small)                                            # libraries take their own memory first
    before = held('VmRSS')
    net = UNet2DConditionModel(**shape)
    n, layers = count(net), [count(layer) for layer in net.modules()
                             if type(layer).__name__ in m.BLOCKS]
    wrapped = m.parallel(net, where, shard=world > 1)
    weights = dict(student=m.trained(net))
    opts = dict(student=torch.optim.AdamW(weights['student'].values(), lr=1e-5, fused=True))
    found = []
    for _ in range(3):
        gc.collect()
        Path('/proc/self/clear_refs').write_text('5')
        learn(wrapped)
        after = held('VmRSS')
        m.update(opts['student'], net)
        found = [held('VmRSS') - before, after - before, held('VmHWM') - before]
    gathered = 4 * (n - sum(layers) + 5 * max(layers)) if world > 1 else 0
    # DDP's buckets stay; gradients of FSDP2 go with the update
    plan = [(16 if world == 1 else 12) * n / world, 16 * n / world, 16 * n / world + gathered]
    plan = [size / 1e9 for size in plan]
    out = args.work / 'ranks'
    shutil.rmtree(out, ignore_errors=True)
    m.dist.barrier()
    out.mkdir(parents=True, exist_ok=True)
    began = time.process_time()
    m.save_state(out, 1, settings('sdxl', iters=1, disk_full='stop'), weights, opts, False,
                 lambda: m.whole_on_rank_0(net.state_dict(), torch.float16))
    if rank == 0:
        for name, a, b in zip(('at rest', 'after backward', 'at most'), found, plan):
            print(f'{world} ranks, {n / 1e6:.0f} M, {name:16s} {a:.2f} GB, computed {b:.2f}')
        print(f'CPU seconds of rank 0 in a save: {time.process_time() - began:.2f}')
    m.dist.destroy_process_group()

# --------------------------------------------------------------------------------------------------
# work and time

def flops(f):
    """Floating-point operations of f(), as torch counts them: matrix products, convolutions,
    attention."""
    with FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops()

def seconds(fs, repeat=5):
    """Median time of each f() after one call to warm up; in turns, so that a machine's slow minutes
    are slow for all."""
    times = [[] for _ in fs]
    for _ in range(repeat + 1):
        for f, own in zip(fs, times):
            began = time.perf_counter()
            f()
            if cuda:
                torch.cuda.synchronize()
            own.append(time.perf_counter() - began)
    return [sorted(own[1:])[repeat // 2] for own in times]

def passes(base, student, disc, batch, encode):
    """(name, how many in a mean iteration, function) of every unavoidable pass at `batch`
    samples."""
    x = torch.randn(batch, *base.latent_shape, device=base.device)
    t = torch.full((batch,), 499., device=base.device)
    pixels = torch.randn(2 * batch, 3, base.size, base.size, device=base.device)
    y = encode()

    def logits(pixels):
        with base.autocast():
            return disc(pixels).float().mean()

    def to_the_latent():
        leaf = x.detach().requires_grad_()
        with base.autocast():
            made = base.decode(leaf)
        torch.autograd.grad(logits(made), leaf)

    def learn():
        base.predict(student, x, t, y).square().mean().backward()

    once = torch.no_grad()(lambda: base.x0(student, x, t, y))
    guided = torch.no_grad()(lambda: base.x0(base.teacher, x, t, y, 4.))
    return [
        ('text encoders', 1, torch.no_grad()(encode)),
        ('student, no gradient', 3, once),                    # 1 before, 2 after, on average
        ('student, forward and backward', 2, learn),
        ('teacher with guidance', 1, guided),
        ('fake score, no gradient', 1, once),
        ('fake score, forward and backward', 1, learn),
        ('VAE, SAM, heads: to the latent', 1, to_the_latent),
        ('SAM, heads: to the heads', 1, lambda: logits(pixels).backward())]

def step(net):
    """A function that is an optimiser's step of net."""
    weights = m.trained(net).values()
    opt = torch.optim.AdamW(weights, lr=1e-9, fused=cuda)

    def run():
        for w in weights:
            w.grad = torch.zeros_like(w)
        m.update(opt, net)
    return run

def work(args):
    """Prints TFLOP of an iteration at SDXL's and SD3-Medium's size and batch 1, what they take at
    most on a card that multiplies 790 TFLOP/s in bf16, as an H200 can be asked for, and TFLOP of
    drawing a picture."""
    for family, lora, many in ('sdxl', 0, 50), ('sd3', 64, 28):
        base, texts = meta_base(family)
        # one dtype will do: nothing is computed
        base.teacher.float()
        base.uncond = [v.float() for v in base.uncond]

        def encode():
            for name, net in texts.items():
                tokens = 256 if name == 'text_encoder_3' else 77
                net(torch.zeros(1, tokens, dtype=torch.long, device='meta'))
            return base.uncond
        student = meta_student(base, lora)
        disc = meta_heads()
        disc.checkpointing = False
        found = [(name, times, flops(f) / 1e12)
                 for name, times, f in passes(base, student, disc, 1, encode)]
        for name, times, each in found:
            print(f'{family}: {times} x {name:36s} {each:8.2f} TFLOP')
        total = sum(times * each for _, times, each in found)
        print(f'{family}: {total:.1f} TFLOP for one sample of an iteration, without recomputation '
              f'for checkpointing; at 790 TFLOP/s {total / 790:.3f} s', flush=True)
        with torch.no_grad():
            z = torch.empty(1, *base.latent_shape, device='meta')
            ends = flops(lambda: (encode(), base.decode(z))) / 1e12
        once = found[1][2]
        few, whole = 4 * once + ends, 2 * many * once + ends
        print(f'{family}: {few:.1f} TFLOP for a picture of 4 steps, {whole:.1f} for {many} steps '
              f'with guidance, {whole / few:.1f} times as many', flush=True)

# --------------------------------------------------------------------------------------------------
# the scripts

def random_pipeline(family, folder):
    """A pipeline folder of that size (SD3 without its T5), a vit_b SAM, 64 pictures of 1024 px."""
    import datasets
    import diffusers
    import numpy as np
    from PIL import Image
    from segment_anything import build_sam_vit_b
    from transformers import CLIPTokenizer
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = CLIPTokenizer.from_pretrained(
        ROOT / 'assets/toy/sdxl/tokenizer', model_max_length=77)
    with device:
        parts = networks(family)
        torch.save(build_sam_vit_b().state_dict(), folder / 'sam.pth')
    for name in ('text_encoder', 'text_encoder_2'):
        parts[name].config.eos_token_id = tokenizer.eos_token_id
    parts |= dict(tokenizer=tokenizer, tokenizer_2=tokenizer)
    if family == 'sdxl':
        kind = diffusers.StableDiffusionXLPipeline
        scheduler = diffusers.EulerDiscreteScheduler(
            beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear')
    else:
        kind = diffusers.StableDiffusion3Pipeline
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.)
        parts |= dict(text_encoder_3=None, tokenizer_3=None)
    kind(**parts, scheduler=scheduler).to(torch.float16).save_pretrained(folder / 'pipeline')
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 64, 3), np.uint8)
    images = [Image.fromarray(a).resize((1024, 1024)) for a in noise]
    table = datasets.Dataset.from_dict(dict(image=images, text=['a picture of noise'] * 64))
    table.to_parquet(folder / 'data.parquet')

def size_flags(args):
    """What the training script is given: the toy, or with CUDA a pipeline of args.family's size."""
    if not cuda:
        return {'--recipe': 'toy', '--model': 'assets/toy/sdxl', '--sam': 'assets/toy/sam.pth',
                '--batch': '16'}
    folder = args.work / args.family
    if not (folder / 'data.parquet').exists():
        random_pipeline(args.family, folder)
    return {'--recipe': args.family, '--model': f'{folder}/pipeline', '--sam': f'{folder}/sam.pth',
            '--data': f'{folder}/data.parquet', '--data_files': '', '--image_column': 'image',
            '--text_column': 'text', '--batch': '4', '--micro': '4'}

def train(args):
    """Prints the passes, their sum and the script's own seconds per iteration. The passes are timed
    before and after the script, as a machine is not always as fast."""
    torch.set_float32_matmul_precision('high')
    flags = size_flags(args)
    run = args.work / 'run'
    batch = int(flags['--batch'])
    base = m.load_base(flags['--model'], device, torch.bfloat16 if cuda else torch.float32)
    lora = None
    if cuda and args.family == 'sd3':
        lora = m.lora_config(base.teacher, 64, 128., 'attention')
    student = base.trainable(lora).to(device)
    disc = m.PixelDiscriminator(m.load_sam_encoder(flags['--sam']), base.size, cuda).to(device)
    if cuda:
        student.enable_gradient_checkpointing()
        base.vae.enable_gradient_checkpointing()
    nets = student, disc, base.teacher, base.vae
    table = passes(base, student, disc, batch,
                   lambda: base.encode(['a red circle on blue'] * batch))
    table += [('optimiser of a network', 2, step(student)),
              ('optimiser of the heads', 1, step(disc))]
    functions = [f for *_, f in table]
    before = seconds(functions)
    for net in nets:
        net.to('cpu')                                     # the script has the card for itself
    logs = {}
    for how in ['', '--compile'] if args.compile else ['']:
        shutil.rmtree(run, ignore_errors=True)
        command = [sys.executable, 'train_stage1.py', *sum(map(list, flags.items()), [])]
        command += ['--iters', args.iters, '--save_every', args.iters, '--log_every', 1,
                    '--sample_every', 0, '--out', run, *how.split()]
        subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)
        lines = (run / 'log.jsonl').read_text().splitlines()
        logs[how] = [json.loads(line) for line in lines][min(5, args.iters - 1):]
    for net in nets:
        net.to(device)
    after = seconds(functions)
    total = 0.
    for (name, times, _), a, b in zip(table, before, after):
        each = (a + b) / 2
        total += times * each
        print(f'{times} x {name:36s} {1e3 * each:8.1f} ms')
    card = torch.cuda.get_device_name() if cuda else f'CPU, {torch.get_num_threads()} threads'
    for how, rows in logs.items():
        whole = sum(row['seconds'] for row in rows) / len(rows)
        print(f'{card}, batch {batch} {how}: {whole:.3f} s per iteration over {len(rows)}, sum of '
              f'the passes {total:.3f} s, ratio {whole / total:.3f}; at most '
              f'{rows[-1]["memory"]:.1f} GiB')

def sample(args):
    """Prints seconds per picture of the student's 4 steps, by plain diffusers and by what sample.py
    does, and of the teacher."""
    name = size_flags(args)['--model']
    pipe = m.load_pipeline(name, '--model', torch.float16 if cuda else torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    batch = 4 if cuda else 16
    prompts = ['a red circle on blue'] * batch
    teacher, few = pipe.scheduler, m.few_step_scheduler(pipe.scheduler)
    how = m.family_of(pipe).called(pipe, 0., batch) | dict(num_inference_steps=4, output_type='pt')
    if m.Schedule(teacher).kind == 'flow':
        how['sigmas'] = [1, .75, .5, .25]

    def plain():
        pipe.scheduler = few
        pipe(prompts, **how).images.float().cpu()

    def ours():
        pipe.scheduler = few
        m.generate(pipe, prompts, range(batch), 0, 4, 0.)

    def many():
        pipe.scheduler = teacher
        m.generate(pipe, prompts, range(batch), 0, 50, 5.)

    names = ['teacher, 50 steps with guidance', 'student, 4 steps, plain diffusers',
             'student, 4 steps, sample.py']
    times = seconds([many, plain, ours], 9)
    if args.compile:
        m.compile_pipeline(pipe)
        names.append('student, 4 steps, sample.py --compile')
        times += seconds([ours], 9)
    for name, each in zip(names, times):
        print(f'{name:40s} {each / batch:8.4f} s per picture, {each / times[1]:6.2f} x plain')

def evaluate(args):
    """Prints what evaluate.py says of its own time."""
    folder = args.work / 'evaluate'
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(
        [sys.executable, 'evaluate.py', '--recipe', 'toy', '--ckpt', 'assets/toy/student', '--n',
         '256', '--n_real', '16', '--out', f'{folder}/a.json'],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    times = json.loads((folder / 'a.json').read_text())['seconds']
    whole, n = times.pop('scoring in all')
    for name, (spent, pictures) in times.items():
        print(f'{name:46s} {pictures / spent:8.1f} pictures/s')
    inside = sum(spent for name, (spent, _) in times.items() if not name.startswith('drawing'))
    print(f'scoring in all: {n / whole:.1f} pictures/s, {1 - inside / whole:.1%} of the time '
          'outside the networks')

if __name__ == '__main__':
    p = m.parser(__doc__)
    yes_no = argparse.BooleanOptionalAction
    p.add_argument('--only', nargs='+', choices=['memory', 'ranks', 'work', 'train', 'sample',
                                                'evaluate'],
                   default=['train', 'sample', 'evaluate'], help='what to measure')
    p.add_argument('--family', choices=['sdxl', 'sd3'], default='sdxl',
                   help='which size to train with a CUDA device')
    p.add_argument('--iters', type=int, default=40, help='iterations of the training script')
    p.add_argument('--compile', action=yes_no, default=cuda,
                   help='train and sample with --compile as well')
    p.add_argument('--work', type=Path, default=ROOT / 'out/bench',
                   help='folder for the run and the random weights')
    args = p.parse_args()
    os.chdir(ROOT)
    m.quiet()
    for name in args.only:
        globals()[name](args)
