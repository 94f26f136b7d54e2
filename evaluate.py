"""
Scores a student beside its teacher, or a folder of pictures: CLIP score, CLIP R-precision, CMMD.

    python evaluate.py                                                  # the newest student and its teacher
    python evaluate.py --ckpt out/stage1 --prompts coco10k.txt --n 10000
    python evaluate.py --images FOLDER                                  # pictures in name order, one per prompt
    torchrun --nproc_per_node=8 -- evaluate.py --n 10000                # the same numbers, prompts split over ranks (the
                                                                        # -- because torchrun has a --n... of its own)

CLIP score          100 x cosine of picture and prompt
R-precision         share of pictures whose own prompt ranks first among 32: itself, the line of FILE.hard.txt beside the
                    prompt file FILE.txt if there is one, the rest other prompts of the list
CMMD                maximum mean discrepancy of CLIP embeddings to real pictures (arXiv 2401.09603; lower is better)
"""

import argparse
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

import model as m

RECIPES = {
    'sdxl': dict(prompts='assets/prompts.txt', clip='openai/clip-vit-large-patch14', real='jackyhate/text-to-image-2M',
                 real_files='data_1024_10K/*.tar', image_column='jpg', text_column='json.prompt', cfg=7.),
    'toy': dict(prompts='assets/toy/data/prompts.txt', clip='assets/toy/clip', real='assets/toy/data',
                real_files='test.parquet', image_column='image', text_column='text', cfg=3.),
}

p = m.parser(__doc__)
p.add_argument('--ckpt', default='', help='run folder or student pipeline; empty: newest of out/stage2, out/stage1, else '
               'the shipped one')
p.add_argument('--teacher', action=argparse.BooleanOptionalAction, default=False,
               help='score the base model (alone, or beside --ckpt)')
p.add_argument('--images', default='', help='score this folder of pictures instead')
p.add_argument('--recipe', choices=['', *RECIPES], default='', help="table of defaults; empty: the student's own")
p.add_argument('--prompts', help='text file, one prompt per line')
p.add_argument('--n', type=int, default=0, help='how many of the prompts; 0: all')
p.add_argument('--steps', type=int, default=4, help="the student's sampling steps")
p.add_argument('--teacher_steps', type=int, default=50, help="the teacher's sampling steps")
p.add_argument('--cfg', type=float, help="the teacher's guidance")
p.add_argument('--clip', help='CLIP as transformers loads it: hub id or folder')
p.add_argument('--real', help='real pictures for CMMD, as --data of train_stage1.py')
p.add_argument('--real_files', help='which files of --real, a pattern; empty: all')
p.add_argument('--image_column', help='column of the pictures in --real')
p.add_argument('--text_column', help='column of the captions in --real')
p.add_argument('--n_real', type=int, default=512, help='how many real pictures')
p.add_argument('--batch', type=int, default=16, help='pictures per call')
p.add_argument('--seed', type=int, default=0, help='picture i depends on (seed, i) alone')
p.add_argument('--out', default='', help='JSON to write; empty: out/evaluate/ and a name made of the settings')
first, _ = p.parse_known_args()
folder, facts = m.find_student(first.ckpt)
p.set_defaults(**RECIPES[first.recipe or facts['recipe']])
args = p.parse_args()
m.at_least(args, n=0, steps=1, teacher_steps=1, batch=1, n_real=1, seed=0)

rank, local_rank, world = (int(os.environ.get(k, d)) for k, d in [('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1)])
device = torch.device('cuda', local_rank) if torch.cuda.is_available() else torch.device('cpu')
if world > 1:
    dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')

prompts = m.read_prompts(args.prompts)
if args.n > len(prompts):
    m.die(f'--n {args.n}: --prompts {args.prompts} has only {len(prompts)}')
hard_file = Path(args.prompts).with_suffix('.hard.txt')
hard = [line.split('\t') for line in m.read_prompts(hard_file)] if hard_file.exists() else [[]] * len(prompts)
if len(hard) != len(prompts):
    m.die(f'{hard_file} has {len(hard)} lines, --prompts {args.prompts} {len(prompts)}; they must match line by line')
n = args.n or len(prompts)
files = sorted(f for f in Path(args.images).iterdir() if f.suffix.lower() in ('.png', '.jpg', '.jpeg', '.webp')) \
    if args.images and Path(args.images).is_dir() else []
if args.images and len(files) < n:
    m.die(f'--images {args.images} has {len(files)} pictures for {n} prompts; give a folder with one per prompt, or --n')

# what to score: name -> function of indices that returns pictures (B, 3, H, W) in [0, 1]
rows = {}
if args.images:
    def read(indices):
        pictures = [ImageOps.fit(Image.open(files[i]).convert('RGB'), Image.open(files[0]).size) for i in indices]
        return torch.stack([torch.from_numpy(np.array(x)).permute(2, 0, 1).float() / 255 for x in pictures])
    rows[args.images] = read
else:
    wanted = [w for w, on in [('student', args.ckpt or not args.teacher), ('teacher', args.teacher or not args.ckpt)] if on]
    for name in wanted:
        source = facts['base_model'] if name == 'teacher' else folder
        pipe = m.load_pipeline(source, '--ckpt', torch.float16 if device.type == 'cuda' else torch.float32).to(device)
        pipe.set_progress_bar_config(disable=True)
        steps = args.teacher_steps if name == 'teacher' else args.steps
        label = f'{source}, {steps} steps' + (f', CFG {args.cfg:g}' if name == 'teacher' else '')
        rows[label] = lambda indices, pipe=pipe, steps=steps: m.generate(
            pipe, [prompts[i] for i in indices], indices, args.seed, steps, args.cfg)

settings = {k: v for k, v in vars(args).items() if k not in ('out', 'batch')} | dict(
    rows=list(rows), iteration=facts['iteration'], prompts_sha256=hashlib.sha256('\n'.join(prompts[:n]).encode()).hexdigest())
tag = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
out = Path(args.out or f'out/evaluate/{tag}.json')
m.writable_folder(out.parent, '--out')
if out.exists():
    try:
        same = json.loads(out.read_text())['settings'] == settings
    except (ValueError, KeyError, TypeError, OSError):
        same = False
    if not same:
        m.die(f'--out {out} holds something else than this evaluation; choose another file')

# ---------------------------------------------------------------------------------------------------------------------
# CLIP


def load_clip(name):
    from transformers import AutoProcessor, CLIPModel
    m.quiet()
    try:
        clip = CLIPModel.from_pretrained(name, dtype=torch.float32)
        return clip.to(device).eval().requires_grad_(False), AutoProcessor.from_pretrained(name)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        m.die(f'--clip {name} could not be loaded or downloaded; --clip assets/toy/clip runs offline '
              f'({" ".join(str(error).split())[:200]})')


clip, processor = load_clip(args.clip)


@torch.no_grad()
def embed_pictures(pictures):
    """(B, 3, H, W) in [0, 1] -> unit vectors (B, D)."""
    arrays = [Image.fromarray((x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()) for x in pictures]
    inputs = processor.image_processor(arrays, return_tensors='pt').to(device)
    return F.normalize(clip.visual_projection(clip.vision_model(**inputs).pooler_output), dim=-1).cpu()


@torch.no_grad()
def embed_texts(texts):
    """List of strings -> unit vectors (B, D)."""
    out = []
    for k in range(0, len(texts), 256):
        inputs = processor.tokenizer(texts[k:k + 256], padding=True, truncation=True, return_tensors='pt').to(device)
        out.append(F.normalize(clip.text_projection(clip.text_model(**inputs).pooler_output), dim=-1).cpu())
    return torch.cat(out)


def cmmd(x, y):
    """1000 x squared MMD of unit vectors x (N, D), y (M, D), Gaussian kernel of width 10, in float64."""
    def mean_kernel(a, b):
        a, b = a.double(), b.double()
        return torch.exp(-torch.cdist(a, b).square() / 200).mean()
    return 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)).item()


def candidates(i):
    """The 32 texts that picture i must choose from, its own first."""
    near = hard[i][:31]
    others = [q for q in dict.fromkeys(prompts) if q != prompts[i] and q not in near]
    order = torch.randperm(len(others), generator=m.generator(args.seed, i, 1)).tolist()
    return [prompts[i]] + near + [others[k] for k in order[:31 - len(near)]]


# ---------------------------------------------------------------------------------------------------------------------

pictures = m.Pictures(args.real, args.real_files, args.image_column, args.text_column,
                      clip.config.vision_config.image_size, args.seed, '--real')
real = torch.cat([embed_pictures((pictures[i]['pixels'][None] + 1) / 2) for i in range(min(args.n_real, len(pictures.rows)))])

table, mine = {}, list(range(rank, n, world))
choices = {i: candidates(i) for i in range(n)}
texts = sorted({t for c in choices.values() for t in c})
place, text_vectors = {t: k for k, t in enumerate(texts)}, embed_texts(texts)
for label, pictures_of in rows.items():
    vectors = {}
    for k in tqdm(range(0, len(mine), args.batch), desc=label, disable=rank > 0):
        part = mine[k:k + args.batch]
        vectors |= dict(zip(part, embed_pictures(pictures_of(part))))
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, vectors)
        vectors = {i: v for share in shares for i, v in share.items()}
    x = torch.stack([vectors[i] for i in range(n)])                                                     # (n, D)
    own = [(x[i] @ text_vectors[place[prompts[i]]]).item() for i in range(n)]
    won = [int((x[i] @ text_vectors[[place[t] for t in choices[i]]].T).argmax() == 0) for i in range(n)]
    table[label] = dict(clip_score=100 * float(np.mean(own)), r_precision=float(np.mean(won)), cmmd=cmmd(x, real), n=n,
                        per_picture=dict(clip_score=own, won=won))

if rank == 0:
    print('| | CLIP score | R-precision | CMMD | pictures |\n|---|---|---|---|---|')
    for label, row in table.items():
        print(f'| {label} | {row["clip_score"]:.2f} | {100 * row["r_precision"]:.1f} % | {row["cmmd"]:.3f} | {row["n"]} |')
    with m.replacing(out) as tmp:
        tmp.write_text(json.dumps(dict(settings=settings, rows=table), indent=1))
    print(out)
if world > 1:
    dist.destroy_process_group()
