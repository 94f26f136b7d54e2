"""
Speed of training and of evaluation.

    python tests/bench.py                    # the toy on the CPU; with a CUDA device SDXL's size, random weights, 1024 px
    python tests/bench.py --only evaluate

memory    GB on one GPU at 1024 px and --micro 1, computed: parameters are counted, and the activations are those of the passes of
          one student update, run on meta tensors with gradient checkpointing
work      TFLOP of an iteration at 1024 px and of drawing a picture, counted on meta tensors
train     seconds per iteration of train_stage1.py, started as a user would, beside the sum of the network passes that it cannot
          avoid, timed one by one in this process (goal: ratio <= 1.05), and the share of the device's peak, which is measured
sample    seconds per picture of 4 steps by plain diffusers, by sample.py, and of the teacher's 50 steps with guidance
evaluate  pictures per second of evaluate.py on the toy: drawing, each score, and the share of the scoring that is spent outside
          the networks. Goal: <= 5 %
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import weakref
from pathlib import Path

import torch
import torch.nn.functional as F
import torch.utils._python_dispatch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import model as m                                                                                        # noqa: E402

cuda = torch.cuda.is_available()
device = torch.device('cuda' if cuda else 'cpu')
p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
p.add_argument('--only', nargs='+', choices=['memory', 'work', 'train', 'sample', 'evaluate'],
               default=['train', 'sample', 'evaluate'], help='what to measure')
p.add_argument('--family', choices=['sdxl', 'sd3'], default='sdxl', help='which size to train with a CUDA device')
p.add_argument('--iters', type=int, default=40, help='iterations of the training script')
p.add_argument('--compile', action=argparse.BooleanOptionalAction, default=cuda, help='train and sample with --compile as well')
p.add_argument('--work', type=Path, default=ROOT / 'out/bench', help='folder for the run and the random weights')


def networks(family):
    """SDXL-base's or SD3-Medium's networks by their places in a pipeline, with their own sizes and random weights."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel
    clip = dict(vocab_size=49408, eos_token_id=2, bos_token_id=0)
    large = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                           projection_dim=768, **clip)
    big = CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
                         projection_dim=1280, **clip)
    vae = dict(sample_size=1024, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
               down_block_types=['DownEncoderBlock2D'] * 4, up_block_types=['UpDecoderBlock2D'] * 4)
    if family == 'sdxl':
        return dict(
            unet=UNet2DConditionModel(
                sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2, attention_head_dim=[5, 10, 20],
                down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'), use_linear_projection=True,
                up_block_types=('CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'), transformer_layers_per_block=[1, 2, 10],
                cross_attention_dim=2048, addition_embed_type='text_time', addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816),
            vae=AutoencoderKL(latent_channels=4, scaling_factor=.13025, **vae),
            text_encoder=CLIPTextModel(large), text_encoder_2=CLIPTextModelWithProjection(big))
    return dict(
        transformer=SD3Transformer2DModel(
            sample_size=128, num_layers=24, num_attention_heads=24, attention_head_dim=64, joint_attention_dim=4096,
            caption_projection_dim=1536, pooled_projection_dim=2048, pos_embed_max_size=192),
        vae=AutoencoderKL(latent_channels=16, scaling_factor=1.5305, shift_factor=.0609, use_quant_conv=False,
                          use_post_quant_conv=False, **vae),
        text_encoder=CLIPTextModelWithProjection(large), text_encoder_2=CLIPTextModelWithProjection(big),
        text_encoder_3=T5EncoderModel(T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                                               feed_forward_proj='gated-gelu')))


def random_pipeline(family, folder):
    """A pipeline folder of that size (SD3 without its T5), a vit_b SAM and 64 pictures of 1024 px."""
    import datasets
    import numpy as np
    from PIL import Image
    from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from diffusers import StableDiffusionXLPipeline
    from segment_anything import build_sam_vit_b
    from transformers import CLIPTokenizer
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / 'assets/toy/sdxl/tokenizer', model_max_length=77)
    with device:
        parts = networks(family)
        torch.save(build_sam_vit_b().state_dict(), folder / 'sam.pth')
    for name in ('text_encoder', 'text_encoder_2'):
        parts[name].config.eos_token_id = tokenizer.eos_token_id
    parts |= dict(tokenizer=tokenizer, tokenizer_2=tokenizer)
    if family == 'sdxl':
        pipe = StableDiffusionXLPipeline(**parts, scheduler=EulerDiscreteScheduler(
            beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear'))
    else:
        pipe = StableDiffusion3Pipeline(**parts | dict(text_encoder_3=None, tokenizer_3=None),
                                        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.))
    pipe.to(torch.float16).save_pretrained(folder / 'pipeline')
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 64, 3), np.uint8)
    datasets.Dataset.from_dict({'image': [Image.fromarray(a).resize((1024, 1024)) for a in noise],
                                'text': ['a picture of noise'] * 64}).to_parquet(folder / 'data.parquet')


def seconds(fs, repeat=5):
    """Median time of each f() after one call to warm up; in turns, so that a machine's slow minutes are slow for all."""
    times = [[] for _ in fs]
    for _ in range(repeat + 1):
        for f, own in zip(fs, times):
            if cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
            f()
            if cuda:
                torch.cuda.synchronize()
            own.append(time.perf_counter() - began)
    return [sorted(own[1:])[repeat // 2] for own in times]


def count(*nets):
    return sum(w.numel() for net in nets for w in net.parameters())


def flops(f):
    """Floating-point operations of f(), as torch's FlopCounterMode counts them: matrix products, convolutions, attention."""
    with FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops()


def peak():
    """FLOP/s of this device in a product of two matrices of 8192 in bf16 (on a CPU 2048 in fp32), the most it can be asked for."""
    n, dtype = (8192, torch.bfloat16) if cuda else (2048, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n ** 3 / seconds([lambda: a @ b], 20)[0]


def passes(base, student, disc, batch, encode):
    """(name, how many in a mean iteration, function) of every unavoidable pass at `batch` samples."""
    x, t = torch.randn(batch, *base.latent_shape, device=base.device), torch.full((batch,), 499., device=base.device)
    y = encode()

    def frozen(f):
        def run():
            with torch.no_grad():
                f()
        return run

    def learn():
        base.predict(student, x, t, y).square().mean().backward()

    def adversary():
        leaf = x.detach().requires_grad_()
        with base.autocast():
            logits = disc(base.decode(leaf))
        torch.autograd.grad(logits.float().mean(), leaf)

    pixels = torch.randn(2 * batch, 3, base.size, base.size, device=base.device)

    def critic():
        with base.autocast():
            logits = disc(pixels)
        logits.float().mean().backward()

    return [
        ('text encoders', 1, frozen(encode)),
        ('student, no gradient', 3, frozen(lambda: base.x0(student, x, t, y))),                 # 1 before, 2 after, on average
        ('student, forward and backward', 2, learn),
        ('teacher with guidance', 1, frozen(lambda: base.x0(base.teacher, x, t, y, 4.))),
        ('fake score, no gradient', 1, frozen(lambda: base.x0(student, x, t, y))),
        ('fake score, forward and backward', 1, learn),
        ('VAE, SAM, heads: to the latent', 1, adversary),
        ('SAM, heads: to the heads', 1, critic)]


def optimisers(student, disc):
    """The same for the optimisers' steps."""
    def step(net):
        opt = torch.optim.AdamW(m.trained(net).values(), lr=1e-9, fused=cuda)

        def run():
            for w in m.trained(net).values():
                w.grad = torch.zeros_like(w)
            m.update(opt, net)
        return run
    return [('optimiser of a network', 2, step(student)), ('optimiser of the heads', 1, step(disc))]


def size_flags(args):
    """What the training script is given: the toy, or with a CUDA device a pipeline of args.family's size."""
    if not cuda:
        return {'--recipe': 'toy', '--model': 'assets/toy/sdxl', '--sam': 'assets/toy/sam.pth'}
    folder = args.work / args.family
    if not (folder / 'data.parquet').exists():
        random_pipeline(args.family, folder)
    return {'--recipe': args.family, '--model': f'{folder}/pipeline', '--sam': f'{folder}/sam.pth', '--data': f'{folder}/data.parquet',
            '--data_files': '', '--image_column': 'image', '--text_column': 'text', '--batch': '4', '--micro': '4'}


def train(args):
    """Prints the passes, their sum, the script's own seconds per iteration, and its share of the device's peak. The passes are
    timed before and after the script, which is a mean's worth of a machine that is not always as fast."""
    torch.set_float32_matmul_precision('high')
    flags, run, rows = size_flags(args), args.work / 'run', []
    batch, lora = int(flags.get('--batch', 16)), args.family == 'sd3' and cuda
    base = m.Base(flags['--model'], device=device, dtype=torch.bfloat16 if cuda else torch.float32)
    student = base.trainable(m.lora_config(base.teacher, 64, 128., 'attention') if lora else None)
    disc = m.PixelDiscriminator(*m.load_sam_encoder(flags['--sam']), base.size, cuda).to(device)
    if cuda:
        student.enable_gradient_checkpointing(), base.vae.enable_gradient_checkpointing()
    names, counts, parts = zip(*passes(base, student, disc, batch, lambda: base.encode(['a red circle on blue'] * batch))
                               + optimisers(student, disc))
    before = seconds(parts)
    for net in (student, disc, base.teacher, base.vae):
        net.to('cpu')                                                              # the script has the card for itself
    for how in [[], ['--compile']] if args.compile else [[]]:
        shutil.rmtree(run, ignore_errors=True)
        subprocess.run([sys.executable, 'train_stage1.py', *sum(map(list, flags.items()), []), *how, '--iters', str(args.iters),
                        '--log_every', '1', '--sample_every', '0', '--save_every', str(args.iters), '--out', str(run)],
                       check=True, stdout=subprocess.DEVNULL)
        rows.append([json.loads(line) for line in (run / 'log.jsonl').read_text().splitlines()][5:])
    for net in (student, disc, base.teacher, base.vae):
        net.to(device)
    times, ops, most = [(a + b) / 2 for a, b in zip(before, seconds(parts))], [*map(flops, parts)], peak()
    total, work = (sum(n * x for n, x in zip(counts, found)) for found in (times, ops))
    for name, count, each, op in zip(names, counts, times, ops):
        print(f'{count} x {name:36s} {1e3 * each:8.1f} ms {count * each / total:6.1%} {op / 1e12:8.3f} TFLOP {op / each / most:6.1%} of peak')
    for how, part in zip(('', ' --compile'), rows):
        whole = sum(r['seconds'] for r in part) / len(part)
        print(f'{torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"}, batch {batch}{how}: '
              f'{whole:.3f} s per iteration over {len(part)}, sum of the passes {total:.3f} s, ratio {whole / total:.3f}; '
              f'{work / 1e12:.2f} TFLOP in an iteration, {work / whole / most:.1%} of the peak of {most / 1e12:.2f} TFLOP/s, '
              f'peak memory {part[-1]["memory"]:.1f} GiB')


def work(args):
    """Prints TFLOP of an iteration at SDXL's and SD3-Medium's size and batch 1, counted on meta tensors, and what they take at most
    on a card that multiplies 790 TFLOP/s in bf16, as an H200 can be asked for."""
    from segment_anything import build_sam_vit_b
    for family in ('sdxl', 'sd3'):
        base, parts = meta_base(family)
        base.teacher.float()
        base.uncond = [v.float() for v in base.uncond]                           # one dtype will do: nothing is computed
        ids = torch.zeros(1, 77, dtype=torch.long, device='meta')
        texts = [v for k, v in parts.items() if k.startswith('text')]

        def encode():
            for net in texts:
                net(ids if net is not parts.get('text_encoder_3') else ids.new_zeros(1, 256))
            return base.uncond
        with torch.device('meta'):
            disc = m.PixelDiscriminator(*m.build_sam_encoder(build_sam_vit_b().state_dict()), 1024)
        student = base.teacher
        if family == 'sd3':
            base.teacher.requires_grad_(False)
            with torch.device('meta'):
                student = base.trainable(m.lora_config(base.teacher, 64, 128., 'attention'))
        found = [(name, count, flops(f)) for name, count, f in passes(base, student, disc, 1, encode)]
        for name, count, ops in found:
            print(f'{family}: {count} x {name:36s} {ops / 1e12:8.2f} TFLOP')
        total = sum(n * c for _, n, c in found) / 1e12
        print(f'{family}: {total:.1f} TFLOP for one sample of an iteration, without recomputation for checkpointing; at 790 TFLOP/s '
              f'{total / 790:.3f} s', flush=True)
        once, many = found[1][2], {'sdxl': 50, 'sd3': 28}[family]
        with torch.no_grad():
            ends = flops(lambda: (encode(), base.decode(torch.empty(1, *base.latent_shape, device='meta'))))
        few, whole = (4 * once + ends) / 1e12, (2 * many * once + ends) / 1e12
        print(f'{family}: {few:.1f} TFLOP for a picture of 4 steps, {whole:.1f} for {many} steps with guidance, {whole / few:.1f} times as '
              'many', flush=True)


def sample(args):
    """Prints seconds per picture of the student's 4 steps, by plain diffusers and by what sample.py does, and of the teacher."""
    pipe, batch = m.load_pipeline(size_flags(args)['--model'], '--model', torch.float16 if cuda else torch.float32), 4 if cuda else 16
    pipe.to(device).set_progress_bar_config(disable=True)
    teacher, prompts = pipe.scheduler, ['a red circle on blue'] * batch
    flow = dict(sigmas=[1, .75, .5, .25]) if m.Schedule(teacher).kind == 'flow' else {}

    few = m.few_step_scheduler(teacher, 4)

    def plain():
        pipe.scheduler = few
        pipe(prompts, num_inference_steps=4, guidance_scale=0., output_type='pt', **flow, **m.text_length(pipe)).images.float().cpu()

    def ours():
        pipe.scheduler = few
        m.generate(pipe, prompts, range(batch), 0, 4, 0.)

    def many():
        pipe.scheduler = teacher
        m.generate(pipe, prompts, range(batch), 0, 50, 5.)
    times = dict(zip(('teacher, 50 steps with guidance', 'student, 4 steps, plain diffusers', 'student, 4 steps, sample.py'),
                     seconds([many, plain, ours], 9)))
    if args.compile:
        m.compile_pipeline(pipe)
        times['student, 4 steps, sample.py --compile'], = seconds([ours], 9)
    for name, each in times.items():
        print(f'{name:40s} {each / batch:8.4f} s per picture, {each / times["student, 4 steps, plain diffusers"]:6.2f} x plain')


class Live(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the bytes of the storages that come to be inside, now and at most."""

    def __init__(self, before):
        super().__init__()
        self.now, self.most, self.known = 0, 0, {w.untyped_storage()._cdata for w in before}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in torch.utils._pytree.tree_leaves(out):
            key = x.untyped_storage()._cdata if isinstance(x, torch.Tensor) else None
            if key and key not in self.known:
                self.known.add(key)
                self.now += x.untyped_storage().nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(x.untyped_storage(), self.gone, key, x.untyped_storage().nbytes())
        return out

    def gone(self, key, size):
        self.known.discard(key)
        self.now -= size


class Flash(torch.autograd.Function):
    """Attention that keeps q, k, v and its answer, as on CUDA; the meta device would keep the matrix."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def meta_base(family):
    """(model.Base of that size on the meta device, bf16, with embeddings of an empty prompt in name only; all its networks)."""
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
    base = m.Base.__new__(m.Base)
    base.part, base.size, base.device = dict(sdxl='unet', sd3='transformer')[family], 1024, torch.device('meta')
    base.autocast = lambda: torch.autocast('cpu', enabled=False)
    base.schedule = m.Schedule(DDPMScheduler() if family == 'sdxl' else FlowMatchEulerDiscreteScheduler(shift=3.))
    c, tokens, width, pooled = (4, 77, 2048, 1280) if family == 'sdxl' else (16, 333, 4096, 2048)
    base.latent_shape = (c, 128, 128)
    with torch.device('meta'):
        parts = networks(family)
        base.teacher, base.vae = parts[base.part].to(torch.bfloat16), parts['vae'].requires_grad_(False)
        base.uncond = torch.empty(1, tokens, width, dtype=torch.bfloat16), torch.empty(1, pooled, dtype=torch.bfloat16)
    return base, parts


def activations(family, lora, crop, n):
    """GB at the peak of one student update of n samples beyond the weights: the passes of Distillation.student_backward, on the meta device."""
    from segment_anything import build_sam_vit_b
    base, _ = meta_base(family)
    x, t = torch.empty(n, *base.latent_shape, dtype=torch.bfloat16, device='meta'), torch.full((n,), 500., device='meta')
    y = [v.repeat_interleave(n, 0) for v in base.uncond]
    with torch.device('meta'):
        disc = m.PixelDiscriminator(*m.build_sam_encoder(build_sam_vit_b().state_dict()), 1024, checkpointing=True)
        student = base.teacher
        if lora:
            base.teacher.requires_grad_(False)
            student = base.trainable(m.lora_config(base.teacher, lora, 2. * lora, 'attention')).to(torch.bfloat16)
    student.enable_gradient_checkpointing(), base.vae.enable_gradient_checkpointing()
    for w in m.trained(student).values():                                        # counted with the optimiser, not here
        w.register_post_accumulate_grad_hook(lambda w: setattr(w, 'grad', None))
    live = Live([*student.parameters(), *base.teacher.parameters(), *base.vae.parameters(), *disc.parameters(), *student.buffers()])
    old, F.scaled_dot_product_attention = F.scaled_dot_product_attention, lambda q, k, v, *a, **kw: Flash.apply(q, k, v)
    with live:
        x0, z = base.x0(student, x, t, y), base.x0(student, x, t, y)
        with torch.no_grad():
            base.x0(base.teacher, x, t, y, 7.)
        leaf = z.detach().requires_grad_()
        push, = torch.autograd.grad(disc(base.decode(leaf[..., :crop // 8, :crop // 8])).mean(), leaf)
        torch.autograd.backward([x0, z], [push, push])
    F.scaled_dot_product_attention = old
    return live.most / 1e9


def stage_2():
    """Prints what stage 2 holds beyond stage 1, in GB: the reference of all weights, rewards, the judges of its evaluations."""
    from transformers import CLIPConfig, CLIPModel
    with torch.device('meta'):
        parts = networks('sdxl')
        reference = count(parts['unet'])
        for unread in m.LatentReward.UNREAD['unet']:
            setattr(parts['unet'], unread, None)
        lrm = count(parts['unet'], parts['text_encoder'], parts['text_encoder_2'])
        h, l = (CLIPModel(CLIPConfig(
            projection_dim=words, text_config=dict(hidden_size=words, intermediate_size=4 * words, num_hidden_layers=layers,
                                                   num_attention_heads=words // 64),
            vision_config=dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=deep, num_attention_heads=16,
                               patch_size=14))) for words, layers, width, deep in ((1024, 24, 1280, 32), (768, 12, 1024, 24)))
    base, _ = meta_base('sd3')
    with Live([*base.vae.parameters()]) as live, torch.no_grad():
        base.decode(torch.empty(1, *base.latent_shape, device='meta'))                     # fp32: autocast makes it less
    print(f'\nstage 2: bf16 reference of SDXL {2 * reference / 1e9:.1f}, bf16 latent reward {2 * lrm / 1e9:.1f}, PickScore '
          f'{4 * count(h) / 1e9:.1f}, CLIP-L of the evaluations {4 * count(l) / 1e9:.1f}, decoding a candidate {live.most / 1e9:.1f}')


def memory(args):
    """Prints the README's table of GB per GPU."""
    from segment_anything import build_sam_vit_b
    m.quiet()
    print('| | GPUs | frozen networks | student, fake score, optimisers | activations | GB | with `--gan_crop 512` |\n' + '|---' * 7 + '|')
    for label, family, lora, worlds in [('SDXL, all weights', 'sdxl', 0, (1, 2, 4, 8)),
                                        ('SDXL, all weights, `--micro 2`', 'sdxl', 0, (8,)),
                                        ('SDXL, `--lora 64`', 'sdxl', 64, (1,)),
                                        ('SD3-Medium, `--lora 64`', 'sd3', 64, (1,)),
                                        ('SD3-Medium, `--lora 64 --no-t5`', 'sd3', 64, (1,)),
                                        ('SD3-Medium, `--lora 64 --offload`', 'sd3', 64, (1,))]:
        with torch.device('meta'):
            parts = networks(family)
            net = next(parts.pop(k) for k in ('unet', 'transformer') if k in parts)
            heads = m.PixelDiscriminator(*m.build_sam_encoder(build_sam_vit_b().state_dict()), 1024)
        n = count(net)
        texts = sum(count(v) for k, v in parts.items() if k.startswith('text') and not ('no-t5' in label and k == 'text_encoder_3'))
        if lora:
            net.requires_grad_(False).add_adapter(m.lora_config(net, lora, 2. * lora, 'attention'))
        own = sum(w.numel() for w in m.trained(net).values())
        # bf16 teacher and text encoders, fp32 VAE and SAM; of a full fine-tune also autocast's bf16 copy of the student
        frozen = 2 * n + 2 * texts * ('offload' not in label) + 4 * count(parts['vae']) + 4 * count(heads) + (0 if lora else 2 * n)
        whole, quarter = (activations(family, lora, crop, 1 + ('micro 2' in label)) for crop in (1024, 512))
        for world in worlds:
            trained = 2 * own * (8 + 8 / world) + 12 * sum(w.numel() for w in heads.heads.parameters())
            total = (frozen + trained) / 1e9
            print(f'| {label} | {world} | {frozen / 1e9:.1f} | {trained / 1e9:.1f} | {whole:.1f} | {total + whole:.1f} | '
                  f'{total + quarter:.1f} |', flush=True)
    stage_2()


def evaluate(args):
    """Prints what evaluate.py says of its own time."""
    work = args.work / 'evaluate'
    shutil.rmtree(work, ignore_errors=True)
    subprocess.run([sys.executable, 'evaluate.py', '--recipe', 'toy', '--ckpt', 'assets/toy/student', '--n', '256', '--n_real', '16',
                    '--out', f'{work}/a.json'], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = json.loads((work / 'a.json').read_text())['seconds']
    whole, n = seconds.pop('scoring in all')
    for name, (spent, count) in seconds.items():
        print(f'{name:46s} {count / spent:8.1f} pictures/s')
    inside = sum(spent for name, (spent, _) in seconds.items() if not name.startswith('drawing'))
    print(f'scoring in all: {n / whole:.1f} pictures/s, {1 - inside / whole:.1%} of the time outside the networks')


if __name__ == '__main__':
    args = p.parse_args()
    os.chdir(ROOT)
    for name in args.only:
        globals()[name](args)
