"""
Speed of training and of evaluation.

    python tests/bench.py                    # the toy on the CPU; with a CUDA device SDXL's size, random weights, 1024 px
    python tests/bench.py --only evaluate

train     seconds per iteration of train_stage1.py, started as a user would, beside the sum of the network passes that it cannot
          avoid, timed one by one in this process. Goal: ratio <= 1.05
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
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import model as m                                                                                        # noqa: E402

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
p.add_argument('--only', nargs='+', choices=['train', 'evaluate'], default=['train', 'evaluate'], help='what to measure')
p.add_argument('--iters', type=int, default=40, help='iterations of the training script')
p.add_argument('--work', type=Path, default=ROOT / 'out/bench', help='folder for the run and the random weights')
cuda = torch.cuda.is_available()
device = torch.device('cuda' if cuda else 'cpu')


def random_sdxl(folder):
    """A pipeline folder with SDXL-base's own sizes and random weights, a vit_b SAM and 64 pictures of 1024 px."""
    import datasets
    import numpy as np
    from PIL import Image
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from segment_anything import build_sam_vit_b
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / 'assets/toy/sdxl/tokenizer', model_max_length=77)
    text = dict(vocab_size=49408, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id)
    with device:
        unet = UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2, attention_head_dim=[5, 10, 20],
            down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'), use_linear_projection=True,
            up_block_types=('CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'), transformer_layers_per_block=[1, 2, 10],
            cross_attention_dim=2048, addition_embed_type='text_time', addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816)
        vae = AutoencoderKL(sample_size=1024, block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
                            down_block_types=['DownEncoderBlock2D'] * 4, up_block_types=['UpDecoderBlock2D'] * 4,
                            scaling_factor=.13025)
        one = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                                           num_attention_heads=12, **text))
        two = CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
                                                         num_attention_heads=20, projection_dim=1280, **text))
        torch.save(build_sam_vit_b().state_dict(), folder / 'sam.pth')
    pipe = StableDiffusionXLPipeline(
        vae=vae, text_encoder=one, text_encoder_2=two, tokenizer=tokenizer, tokenizer_2=tokenizer, unet=unet,
        scheduler=EulerDiscreteScheduler(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear'))
    pipe.to(torch.float16).save_pretrained(folder / 'pipeline')
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 64, 3), np.uint8)
    datasets.Dataset.from_dict({'image': [Image.fromarray(a).resize((1024, 1024)) for a in noise],
                                'text': ['a picture of noise'] * 64}).to_parquet(folder / 'data.parquet')


def seconds(f, repeat=5):
    """Median time of f() after one call to warm up."""
    times = []
    for _ in range(repeat + 1):
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        f()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[repeat // 2]


def passes(flags, batch, checkpointing):
    """(name, how many in a mean iteration, seconds of one) of every unavoidable pass at `batch` samples."""
    dtype = torch.bfloat16 if cuda else torch.float32
    base = m.Base(flags['--model'], device=device, dtype=dtype)
    student = base.trainable()
    disc = m.PixelDiscriminator(*m.load_sam_encoder(flags['--sam']), base.size, checkpointing).to(device)
    if checkpointing:
        student.enable_gradient_checkpointing(), base.vae.enable_gradient_checkpointing()
    x, t = torch.randn(batch, *base.latent_shape, device=device), torch.full((batch,), 499., device=device)
    prompts = ['a red circle on blue'] * batch
    y = base.encode(prompts)
    opt, heads_opt = (torch.optim.AdamW([w for w in n.parameters() if w.requires_grad], lr=1e-9, fused=cuda) for n in (student, disc))

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

    pixels = torch.randn(2 * batch, 3, base.size, base.size, device=device)

    def critic():
        with base.autocast():
            logits = disc(pixels)
        logits.float().mean().backward()

    def step(o, net):
        def run():
            for w in net.parameters():
                if w.requires_grad:
                    w.grad = torch.zeros_like(w)
            m.update(o, net)
        return run

    return [
        ('text encoders', 1, seconds(lambda: base.encode(prompts))),
        ('student, no gradient', 3, seconds(frozen(lambda: base.x0(student, x, t, y)))),        # 1 before, 2 after, on average
        ('student, forward and backward', 2, seconds(learn)),
        ('teacher with guidance', 1, seconds(frozen(lambda: base.x0(base.teacher, x, t, y, 4.)))),
        ('fake score, no gradient', 1, seconds(frozen(lambda: base.x0(student, x, t, y)))),
        ('fake score, forward and backward', 1, seconds(learn)),
        ('VAE, SAM, heads: to the latent', 1, seconds(adversary)),
        ('SAM, heads: to the heads', 1, seconds(critic)),
        ('optimiser of a network', 2, seconds(step(opt, student))),
        ('optimiser of the heads', 1, seconds(step(heads_opt, disc))),
    ]


def train(args):
    """Prints the passes and their sum beside the script's own seconds per iteration."""
    if cuda:
        torch.set_float32_matmul_precision('high')
        if not (args.work / 'sdxl/data.parquet').exists():
            random_sdxl(args.work / 'sdxl')
        flags = {'--recipe': 'sdxl', '--model': f'{args.work}/sdxl/pipeline', '--sam': f'{args.work}/sdxl/sam.pth',
                 '--data': f'{args.work}/sdxl/data.parquet', '--data_files': '', '--image_column': 'image',
                 '--text_column': 'text', '--batch': '4', '--micro': '4'}
    else:
        flags = {'--recipe': 'toy', '--model': 'assets/toy/sdxl', '--sam': 'assets/toy/sam.pth'}
    run = args.work / 'run'
    shutil.rmtree(run, ignore_errors=True)
    subprocess.run([sys.executable, 'train_stage1.py', *sum(map(list, flags.items()), []), '--iters', str(args.iters),
                    '--log_every', '1', '--sample_every', '0', '--save_every', str(args.iters), '--out', str(run)],
                   check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (run / 'log.jsonl').read_text().splitlines()][5:]
    whole = sum(r['seconds'] for r in rows) / len(rows)
    batch = int(flags.get('--batch', 16))
    total = 0
    for name, count, each in passes(flags, batch, cuda):
        total += count * each
        print(f'{count} x {name:36s} {1e3 * each:8.1f} ms')
    print(f'{torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"}, batch {batch}: '
          f'{whole:.3f} s per iteration over {len(rows)}, sum of the passes {total:.3f} s, ratio {whole / total:.3f}, '
          f'peak memory {rows[-1]["memory"]:.1f} GiB')


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
