"""
The paper's table: scores a student beside its teacher, any diffusers pipeline, or a folder of pictures.

    python evaluate.py                                          # newest student, its teacher, its teacher at 4 steps
    python evaluate.py --ckpt out/stage1 --prompts coco10k.txt --n 10000 --real COCO_FOLDER --n_real 10000 --metrics clip \
        pickscore hpsv2 imagereward mps fid
    python evaluate.py --ckpt out/stage2 out/stage1             # two students, and the intervals of their difference
    python evaluate.py --pipeline stabilityai/sdxl-turbo --teacher_steps 4 --cfg 0
    python evaluate.py --images FOLDER                          # pictures made by anything else
    torchrun --nproc_per_node=8 -- evaluate.py --n 10000        # the same numbers, prompts split over ranks (the -- because
                                                                # torchrun has a --n... of its own)

Metrics: the rewards of rewards.py (clip, pickscore, hpsv2, hpsv2.1, imagereward, mps, aesthetic), and
rprecision      share of pictures whose own prompt ranks first among 32 by CLIP: itself, the line of FILE.hard.txt beside the
                prompt file FILE.txt if there is one, the rest other prompts of the list
cmmd, fid       distance to the real pictures of --real by CLIP (arXiv 2401.09603) or Inception (clean-fid) features

Pictures are kept in pictures/ beside --out, and those already made are not made again, so a killed run goes on. Brackets are
95 % bootstrap intervals over the prompts. In FOLDER a metadata.jsonl (file_name, text) ties pictures to prompts; without one
the last number in the name is the prompt's line, from 0; without numbers the pictures come in name order.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from tqdm import tqdm

import model as m
import rewards as R

METRICS = [*R.SCORES, 'rprecision', 'cmmd', 'fid']
RECIPES = {
    'sdxl': dict(prompts='assets/prompts.txt', real='jackyhate/text-to-image-2M', real_files='data_1024_10K/*.tar',
                 image_column='jpg', text_column='json.prompt', cfg=7.,
                 metrics=['clip', 'imagereward', 'pickscore', 'hpsv2', 'mps', 'rprecision', 'cmmd']),
    'toy': dict(prompts='assets/toy/data/prompts.txt', clip='assets/toy/clip', pickscore='assets/toy/pickscore',
                real='assets/toy/data', real_files='test.parquet', image_column='image', text_column='text', cfg=3.,
                metrics=['clip', 'pickscore', 'rprecision', 'cmmd']),
}
RECIPES |= {'sd3': RECIPES['sdxl'] | dict(teacher_steps=28), 'toy-sd3': RECIPES['toy'] | dict(teacher_steps=28)}
# Flash-DMD's tables 1 to 3: 10,000 prompts of COCO 2014. Which CLIP and which version of HPSv2 is not stated there
PAPER = {
    'stable-diffusion-xl': {
        'paper: SDXL, 50 steps with CFG': dict(imagereward=.7143, pickscore=.2265, hpsv2=.2865, mps=11.87),
        'paper: DMD2, 4 steps': dict(imagereward=.8748, pickscore=.2309, hpsv2=.2937, mps=12.41),
        'paper: Flash-DMD stage 1, 64 x 1000': dict(imagereward=.9509, pickscore=.2322, hpsv2=.2968, mps=12.67),
        'paper: Flash-DMD stage 1, 64 x 8000': dict(imagereward=.9740, pickscore=.2327, hpsv2=.2981, mps=12.71),
        'paper: Flash-DMD stage 2': dict(imagereward=1.0035, pickscore=.2346, mps=12.84)},
    'stable-diffusion-3': {
        'paper: SD3-Medium, 28 steps, CFG 7': dict(imagereward=1.0173),
        'paper: Flash-DMD stage 1, 32 x 4000': dict(imagereward=1.0193)},
}

p = m.parser(__doc__)
p.add_argument('--ckpt', nargs='+', default=[], help='run folders or student pipelines, one row each; none: newest of '
               'out/stage2, out/stage1, else the shipped one')
p.add_argument('--teacher', action=argparse.BooleanOptionalAction, default=False,
               help='score the base model (alone, or beside --ckpt)')
p.add_argument('--pipeline', default='', help='score this diffusers pipeline, folder or hub id, by --teacher_steps, --cfg')
p.add_argument('--images', default='', help='score this folder of pictures instead')
p.add_argument('--recipe', choices=['', *RECIPES], default='', help="table of defaults; empty: the student's own")
p.add_argument('--metrics', nargs='+', choices=METRICS, help='what to compute')
p.add_argument('--prompts', help='text file, one prompt per line')
p.add_argument('--n', type=int, default=0, help='how many of the prompts; 0: all')
p.add_argument('--steps', type=int, default=4, help="the student's sampling steps")
p.add_argument('--teacher_steps', type=int, default=50, help="the teacher's sampling steps")
p.add_argument('--cfg', type=float, help="the teacher's guidance")
for name, (_, source, title, _) in R.SCORES.items():
    p.add_argument(f'--{name}', default=source, help=f'weights of {title}: hub id, folder or file')
p.add_argument('--real', help='real pictures for cmmd and fid, as --data of train_stage1.py')
p.add_argument('--real_files', help='which files of --real, a pattern; empty: all')
p.add_argument('--image_column', help='column of the pictures in --real')
p.add_argument('--text_column', help='column of the captions in --real')
p.add_argument('--n_real', type=int, default=512, help='how many real pictures')
p.add_argument('--batch', type=int, default=16, help='pictures per call')
p.add_argument('--workers', type=int, default=2, help='processes per rank that read pictures')
p.add_argument('--seed', type=int, default=0, help='picture i depends on (seed, i) alone')
p.add_argument('--sheet', choices=['', *METRICS[:-2]], default='',
               help='draw the 16 best and the 16 worst pictures by this score, beside --out')
p.add_argument('--out', default='', help='JSON to write; empty: out/evaluate/ and a name made of the settings')
first, _ = p.parse_known_args()
students = [m.find_student(ckpt) for ckpt in first.ckpt or ['']]
facts = students[0][1]
if (first.recipe or facts['recipe']) not in RECIPES:
    m.die(f"--ckpt: its recipe is {facts['recipe']!r}; give --recipe {' or '.join(RECIPES)}")
p.set_defaults(**RECIPES[first.recipe or facts['recipe']])
args = p.parse_args()
m.at_least(args, n=0, steps=1, teacher_steps=1, batch=1, n_real=1, seed=0, workers=0, cfg=0)
if args.sheet and args.sheet not in args.metrics:
    m.die(f'--sheet {args.sheet} is not among --metrics {" ".join(args.metrics)}; add it there')

rank, local_rank, world = m.ranks()
device = torch.device('cuda', local_rank) if torch.cuda.is_available() else torch.device('cpu')
if device.type == 'cuda':
    torch.cuda.set_device(device)
if world > 1:
    dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo', timeout=timedelta(hours=2))


def gathered(value):
    """The list of every rank's value; itself alone without ranks."""
    if world == 1:
        return [value]
    values = [None] * world
    dist.all_gather_object(values, value)
    return values


# ---------------------------------------------------------------------------------------------------------------------
# prompts, and for given pictures which file belongs to which prompt

files, tied = {}, Path(args.images, 'metadata.jsonl') if args.images else None
tied = tied if tied and tied.exists() else None
if tied:
    try:
        entries = [json.loads(line) for line in tied.read_text(encoding='utf-8').splitlines() if line.strip()]
        files = {i: Path(args.images) / e['file_name'] for i, e in enumerate(entries)}
        prompts = [e['text'] for e in entries]
    except (ValueError, KeyError, TypeError) as error:
        m.die(f'--images: {tied} must have a file_name and a text in every line ({error!r})')
else:
    prompts = m.read_prompts(args.prompts)
    found = sorted(f for f in Path(args.images).glob('*') if f.suffix.lower() in ('.png', '.jpg', '.jpeg', '.webp')) \
        if args.images else []
    numbers = [re.findall(r'\d+', f.stem)[-1:] for f in found]
    files = {int(k[0]): f for k, f in zip(numbers, found)} if all(numbers) else dict(enumerate(found))
    if len(files) < len(found):
        m.die(f'--images {args.images}: two names have the same number; number them by prompt, or add a metadata.jsonl')
n = args.n or (len(prompts) if not files else min(len(prompts), 1 + max(files)))
if n > len(prompts):
    m.die(f'--n {n}: {tied or "--prompts " + args.prompts} has only {len(prompts)} prompts')
if args.images and not any(i < n for i in files):
    m.die(f'--images {args.images} has no picture for {n} prompts; give a folder of .png, .jpg or .webp files, one each')
hard_file = Path(args.prompts).with_suffix('.hard.txt')
hard = [line.split('\t') for line in m.read_prompts(hard_file)] if hard_file.exists() and not tied else [[]] * len(prompts)
if len(hard) != len(prompts):
    m.die(f'{hard_file} has {len(hard)} lines, --prompts {args.prompts} {len(prompts)}; they must match line by line')

# ---------------------------------------------------------------------------------------------------------------------
# rows of the table: label -> (pipeline or None, its steps)

base_name = facts['base_model']
if args.images:
    rows = {args.images: (None, 0)}
elif args.pipeline:
    rows = {f'{args.pipeline}, {args.teacher_steps} steps, CFG {args.cfg:g}': (args.pipeline, args.teacher_steps)}
else:
    teacher = lambda steps: {f'{base_name}, {steps} steps, CFG {args.cfg:g}': (base_name, steps)}
    students = students if args.ckpt or not args.teacher else []
    rows = {f'{folder}, {args.steps} steps': (str(folder), args.steps) for folder, _ in students}
    rows |= teacher(args.teacher_steps) if args.teacher or not args.ckpt else {}
    rows |= teacher(args.steps) if not args.teacher and not args.ckpt else {}


def digest(source):
    """sha256 of a folder's weights and settings, '' for a hub id."""
    if not Path(source).is_dir():
        return ''
    whole = hashlib.sha256()
    for file in sorted(f for f in Path(source).rglob('*') if f.suffix in ('.safetensors', '.json')):
        with file.open('rb') as f:
            while block := f.read(2 ** 24):
                whole.update(block)
    return whole.hexdigest()


weights = gathered({source: digest(source) for source in {s for s, _ in rows.values() if s}} if rank == 0 else None)[0]
settings = {k: v for k, v in vars(args).items() if k not in ('out', 'batch', 'workers', 'sheet')} | dict(
    rows=list(rows), n=n, weights=weights, iterations=[f['iteration'] for _, f in students],
    prompts_sha256=hashlib.sha256('\n'.join(prompts).encode()).hexdigest())
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
real = None
if {'cmmd', 'fid'} & {*args.metrics}:
    real = m.Pictures(args.real, args.real_files, args.image_column, args.text_column, 0, args.seed, '--real')
    n_real = min(args.n_real, len(real.rows))

# ---------------------------------------------------------------------------------------------------------------------
# the networks that score

scorers, unavailable = {}, {}


def load_scorers(device):
    """The networks of --metrics, or why there is none."""
    for name in dict.fromkeys('clip' if k in ('rprecision', 'cmmd') else k for k in args.metrics if k != 'fid'):
        try:
            scorers[name] = R.SCORES[name][0](vars(args)[name], device)
        except R.Unavailable as error:
            unavailable[name] = str(error)


m.quiet()
load_scorers('cpu')                               # before anything is drawn, but not on the device, where the pipeline goes
for name in ('rprecision', 'cmmd'):
    if name in args.metrics and 'clip' in unavailable:
        unavailable[name] = unavailable['clip']
if not scorers and 'fid' not in args.metrics:
    m.die('none of --metrics could be had: ' + '; '.join(unavailable.values()))

# ---------------------------------------------------------------------------------------------------------------------
# pictures: made once, kept as PNG

mine = list(range(rank, n, world))
seconds = {}                                                                 # of this rank, by row and by metric


def write(path, array):
    with m.replacing(path) as tmp:
        Image.fromarray(array).save(tmp, 'PNG')


def make(label, source, steps):
    """Draws this rank's missing pictures of a row; returns {index: file} of all of them."""
    dtype = torch.float16 if device.type == 'cuda' else torch.float32
    key = dict(source=source, weights=weights[source], steps=steps, cfg=args.cfg, seed=args.seed, dtype=str(dtype),
               prompts=settings['prompts_sha256'])
    place = out.parent / 'pictures' / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:10]
    names = {i: place / f'{i:06d}.png' for i in range(n)}
    missing = [i for i in mine if not names[i].exists()]
    if missing:
        own = next((f for folder, f in students if str(folder) == source and not args.pipeline), None)
        pipe = m.load_student(source, own, dtype) if own else m.load_pipeline(
            source, '--pipeline' if args.pipeline else '--ckpt', dtype, None if args.pipeline else facts.get('t5'))
        pipe.to(device)
        pipe.set_progress_bar_config(disable=True)
        place.mkdir(parents=True, exist_ok=True)
        (place / 'settings.json').write_text(json.dumps(key, indent=1))
        began = time.time()
        for k in tqdm(range(0, len(missing), args.batch), desc=label, disable=rank > 0):
            part = missing[k:k + args.batch]
            pictures = m.generate(pipe, [prompts[i] for i in part], part, args.seed, steps, args.cfg)
            for i, x in zip(part, pictures):
                write(names[i], (x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
        seconds[f'drawing: {label}'] = (time.time() - began, len(missing))
    gathered(None)                                                           # nobody reads before all are drawn
    return names


class Files(torch.utils.data.Dataset):
    """(index, picture (3, H, W) in [0, 1]), or None for the picture where the file cannot be read."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, k):
        i, file = self.items[k]
        try:
            return i, torch.from_numpy(np.array(Image.open(file).convert('RGB'))).permute(2, 0, 1).float() / 255
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return i, None


def batches(items):
    """Lists of up to --batch (index, picture) of one size, read in worker processes."""
    workers = args.workers if os.name == 'posix' and os.uname().sysname != 'Darwin' else 0
    for rows in torch.utils.data.DataLoader(Files(items), args.batch, num_workers=workers, collate_fn=list,
                                            multiprocessing_context='fork' if workers else None):
        for size in {x.shape for _, x in rows if x is not None}:
            yield [(i, x) for i, x in rows if x is not None and x.shape == size]


pictures_of = {label: make(label, *source) if source[0] else {i: f for i, f in files.items() if i < n}
               for label, source in rows.items()}

# ---------------------------------------------------------------------------------------------------------------------
# scores

if device.type != 'cpu':
    load_scorers(device)


@torch.no_grad()
def score(label):
    """Scores this rank's share of a row's pictures: {metric: {index: float}} and {index: CLIP embedding}."""
    scores, vectors = {name: {} for name in scorers}, {}
    share = [(i, pictures_of[label][i]) for i in mine if i in pictures_of[label]]
    bar = tqdm(total=len(share), desc=f'scoring {label}', disable=rank > 0)
    began = time.time()
    for rows in batches(share):
        index, texts = [i for i, _ in rows], [prompts[i] for i, _ in rows]
        x = torch.stack([x for _, x in rows]).to(device)
        for name, scorer in scorers.items():
            start = time.time()
            if name == 'clip':
                v = scorer.embed_images(x)
                vectors |= dict(zip(index, v.float().cpu()))
                values = 100 * (v * scorer.embed_texts(texts)).sum(1)
            else:
                values = scorer.score(x, texts)
            scores[name] |= dict(zip(index, values.float().tolist()))                  # waits for the device
            spent, count = seconds.get(name, (0, 0))
            seconds[name] = (spent + time.time() - start, count + len(rows))
        bar.update(len(rows))
    spent, count = seconds.get('scoring in all', (0, 0))
    seconds['scoring in all'] = (spent + time.time() - began, count + len(share))
    return scores, vectors


results = {}
for label in rows if scorers else ():
    shares = gathered(score(label))
    results[label] = {name: {i: v for s, _ in shares for i, v in s[name].items()} for name in scorers}, \
        {i: v for _, s in shares for i, v in s.items()}
truncated = {name: sum(gathered(s.truncated)) for name, s in scorers.items()}
if rank:
    gathered(None)                                                           # rank 0 alone does the rest
    dist.destroy_process_group()
    raise SystemExit

expected = {label: [i for i in range(n) if i in pictures_of[label]] for label in rows}
readable = {label: sorted(next(iter(results[label][0].values()))) if scorers else expected[label] for label in rows}
for label in rows:
    for i in sorted({*expected[label]} - {*readable[label]}):
        print(f'{pictures_of[label][i]} cannot be read: left out')
    if not readable[label]:
        m.die(f'{label}: none of its {len(expected[label])} pictures can be read; give PNG, JPEG or WebP files')
if real:                                     # as large as the pictures that they are compared with
    a = next(iter(rows))
    real.size = min(Image.open(pictures_of[a][readable[a][0]]).size)
if 'clip' in scorers and 'cmmd' in args.metrics:
    reals = torch.utils.data.DataLoader(torch.utils.data.Subset(real, range(n_real)), args.batch)
    with torch.no_grad():
        real_vectors = torch.cat([scorers['clip'].embed_images((x['pixels'].to(device) + 1) / 2).cpu()
                                  for x in tqdm(reals, desc='real pictures')])

# ---------------------------------------------------------------------------------------------------------------------
# the table: means and distances with bootstrap intervals


def statistics(label, index):
    """{metric: (its value, its value in 1,000 resamplings of the prompts)} on the pictures `index`, the same resamplings
    for every row."""
    scores, vectors = results[label]
    N = len(index)
    drawn = torch.randint(N, (1000, N), generator=m.generator(args.seed, 2))
    w = torch.zeros(1000, N, dtype=torch.float64).scatter_add_(1, drawn, torch.full_like(drawn, 1 / N, dtype=torch.float64))
    out = {k: torch.tensor([scores[k][i] for i in index], dtype=torch.float64) for k in scores if k in args.metrics}
    if 'rprecision' in args.metrics and vectors:
        out['rprecision'] = torch.tensor([won[label][i] for i in index], dtype=torch.float64)
    out = {name: (x.mean().item(), w @ x) for name, x in out.items()}
    if 'cmmd' in args.metrics and vectors:
        x = torch.stack([vectors[i] for i in index])
        xx, xy, yy = R.kernel(x, x), R.kernel(x, real_vectors).mean(1), R.kernel(real_vectors, real_vectors).mean()
        value, resampled = (1000 * v for v in (xx.mean() - 2 * xy.mean() + yy, (w @ xx * w).sum(1) - 2 * w @ xy + yy))
        out['cmmd'] = value.item(), resampled - resampled.mean() + value  # a picture drawn twice is near itself: a bias
    return out


def interval(resampled):
    """95 % bootstrap interval."""
    return torch.quantile(resampled, torch.tensor([.025, .975], dtype=torch.float64)).tolist()


won = {}
if 'rprecision' in args.metrics and 'clip' in scorers:
    for label, (_, vectors) in results.items():
        index = readable[label]
        first_of_32 = R.r_precision(scorers['clip'], [vectors[i] for i in index], index, prompts, hard, args.seed)
        won[label] = dict(zip(index, first_of_32.tolist()))

table, differences = {}, {}
for label in rows:
    index = readable[label]
    values = statistics(label, index) if scorers else {}
    table[label] = {k: dict(value=v, interval=interval(r)) for k, (v, r) in values.items()} | dict(
        n=len(index), unreadable=len(expected[label]) - len(index), missing=n - len(expected[label]),
        per_picture={k: [v[i] for i in index] for k, v in {**(results[label][0] if scorers else {}),
                                                           **({'rprecision': won[label]} if won else {})}.items()
                     if k in args.metrics} | dict(index=index))
    if label != next(iter(rows)) and scorers:
        one = next(iter(rows))
        both = [i for i in index if i in readable[one]]
        a, b = statistics(one, both), statistics(label, both)
        differences[f'{one} minus {label}'] = {
            k: dict(value=a[k][0] - b[k][0], interval=interval(a[k][1] - b[k][1])) for k in a}

if 'fid' in args.metrics:
    try:
        key = [args.real, args.real_files, args.image_column, args.seed, real.size]
        place = out.parent / 'pictures' / ('real-' + hashlib.sha256(json.dumps(key).encode()).hexdigest()[:10])
        place.mkdir(parents=True, exist_ok=True)
        real_files = [place / f'{i:06d}.png' for i in range(n_real)]
        for i in tqdm(range(n_real), desc='real pictures'):
            if not real_files[i].exists():
                write(real_files[i], ((real[i]['pixels'] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
        for label in rows:
            table[label]['fid'] = dict(value=R.fid(
                [pictures_of[label][i] for i in readable[label]], real_files, device, args.batch, args.workers))
    except R.Unavailable as error:
        unavailable['fid'] = str(error)

titles = {k: (v[2], v[3]) for k, v in R.SCORES.items()} | dict(
    rprecision=('R-precision', '{:.1%}'), cmmd=('CMMD', '{:.3f}'), fid=('FID', '{:.2f}'))


def cell(entry, pattern):
    if not entry:
        return '-'
    between = f' [{", ".join(pattern.format(v) for v in entry["interval"])}]' if entry.get('interval') else ''
    return pattern.format(entry['value']) + between


def show(lines, count):
    print('| | ' + ' | '.join(titles[k][0] for k in args.metrics) + (' | pictures |' if count else ' |'))
    print('|---' * (len(args.metrics) + 1 + count) + '|')
    for label, row in lines.items():
        print(f'| {label} | ' + ' | '.join(cell(row.get(k), titles[k][1]) for k in args.metrics)
              + (f' | {row["n"]} |' if count else ' |'))


family = dict(sdxl='stable-diffusion-xl', sd3='stable-diffusion-3')
family = family.get(args.recipe or facts['recipe'], '') if args.images or args.pipeline else base_name
paper = next((v for k, v in PAPER.items() if k in family), {})
published = {k: {name: dict(value=v) for name, v in row.items()} | dict(n='10,000 of COCO') for k, row in paper.items()}
show(table | published, True)
if differences:
    print()
    show(differences, False)
for name, why in unavailable.items():
    print(f'{titles[name][0]}: {why}' + ('; --clip assets/toy/clip runs offline' if name == 'clip' else ''))
for name, count in truncated.items():
    if count:
        print(f'{titles[name][0]}: {count} prompts were longer than its text encoder and cut')
if args.sheet and scorers:
    for k, label in enumerate(rows):
        index, values = table[label]['per_picture']['index'], table[label]['per_picture'].get(args.sheet, [])
        order = sorted(range(len(values)), key=lambda j: -values[j])
        picked = order[:16] + order[16:][-16:]
        sheet = out.with_name(f'{out.stem}-{args.sheet}-{k}.png')
        if picked:
            opened = [Image.open(pictures_of[label][index[j]]).convert('RGB') for j in picked]
            shown = np.stack([np.array(ImageOps.fit(x, (256, 256))) for x in opened])
            m.picture_grid([torch.from_numpy(shown).permute(0, 3, 1, 2) / 127.5 - 1],
                           [f'{titles[args.sheet][1].format(values[j])} {prompts[index[j]]}' for j in picked], sheet)
            print(f'{sheet}: the 16 best and the 16 worst of {label}')
with m.replacing(out) as tmp:
    tmp.write_text(json.dumps(dict(
        settings=settings, rows=table, differences=differences, unavailable=unavailable, truncated=truncated,
        seconds=seconds, device=torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu',
        versions={k: importlib.metadata.version(k) for k in ('torch', 'diffusers', 'transformers')}), indent=1))
print(out)
gathered(None)
if world > 1:
    dist.destroy_process_group()
