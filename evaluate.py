"""
The paper's table: scores a student beside its teacher, any diffusers pipeline, or a folder.

    python evaluate.py                        # newest student, its teacher, the teacher at 4 steps
    python evaluate.py --ckpt out/stage2 out/stage1     # two, and the intervals of their difference
    python evaluate.py --pipeline stabilityai/sdxl-turbo --recipe sdxl --teacher_steps 4 --cfg 0
    python evaluate.py --images FOLDER                  # pictures made by anything else
    torchrun --nproc_per_node=8 -- evaluate.py --n 10000      # the same numbers (mind the --)

Metrics: the rewards of rewards.py (clip, pickscore, hpsv2, hpsv2.1, imagereward, mps, aesthetic),
rprecision    share of pictures whose own prompt ranks first among 32 by CLIP: itself, the line of
              FILE.hard.txt beside the prompt file FILE.txt if there is one, the rest other prompts
margin        CLIP score of the own prompt less the highest of those 31 others, finer
sharpness     deviation of the grey picture's Laplacian, of 255; noise counts as sharpness
spectrum      distance to the pictures of --real (through --real_vae, if given) of the log energy by
              frequency, rms over six bands: texture that is missing or too much, noise as well
cmmd, fid     distance to the pictures of --real by --clip (2401.09603's formula; its own network
              is openai/clip-vit-large-patch14-336) or by Inception (clean-fid). Few pictures raise
              both, so compare at one --n and --n_real

Pictures are kept in pictures/ beside --out and not made again, so a killed run goes on. Brackets
are 95 % bootstrap intervals over the prompts. In FOLDER pictures are tied to prompts by a
metadata.jsonl (file_name, text); else by the prompt that A1111 or ComfyUI wrote into them; else by
the one number in their names that counts them, 0 being the first line of --prompts (or 1, where
there are as many pictures as lines); else by name order. The rule is printed.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas
import torch
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from tqdm import tqdm

import model as m
import rewards as R

METRICS = [*R.SCORES, 'rprecision', 'margin', 'sharpness', 'spectrum', 'cmmd', 'fid']
RECIPES = {
    'sdxl': dict(
        prompts='assets/prompts.txt', real='common-canvas/commoncatalog-cc-by', image_column='jpg',
        real_files='8/least_dim_range=1024-2048/aspect_ratio_bucket=1-1/part-00001-*.parquet',
        cfg=7.,
        metrics=['clip', 'imagereward', 'pickscore', 'hpsv2', 'mps', 'rprecision', 'cmmd']),
    'toy': dict(
        prompts='assets/toy/data/prompts.txt', real='assets/toy/data', real_files='test.parquet',
        image_column='image', cfg=3., clip='assets/toy/clip',
        pickscore='assets/toy/pickscore', metrics=['clip', 'pickscore', 'rprecision', 'cmmd'])}
RECIPES['sd3'] = RECIPES['sdxl'] | dict(teacher_steps=28)
RECIPES['qwen'] = RECIPES['sdxl'] | dict(cfg=4.)
RECIPES['zimage'] = RECIPES['sdxl'] | dict(cfg=5.)
RECIPES['toy-sd3'] = RECIPES['toy'] | dict(teacher_steps=28)
# Flash-DMD's tables 1 to 3: 10,000 prompts of COCO 2014. Which CLIP and HPSv2 is not stated there
PUBLISHED = 'imagereward', 'pickscore', 'hpsv2', 'mps'
PAPER = dict(
    sdxl={'SDXL, 50 steps with CFG': ['0.7143', '0.2265', '0.2865', '11.87'],
          'DMD2, 4 steps': ['0.8748', '0.2309', '0.2937', '12.41'],
          'Flash-DMD stage 1, 64 x 1000': ['0.9509', '0.2322', '0.2968', '12.67'],
          'Flash-DMD stage 1, 64 x 8000': ['0.9740', '0.2327', '0.2981', '12.71'],
          'Flash-DMD stage 2': ['1.0035', '0.2346', '-', '12.84']},
    sd3={'SD3-Medium, 28 steps, CFG 7': ['1.0173'], 'Flash-DMD stage 1, 32 x 4000': ['1.0193']})

p = m.parser(__doc__, RECIPES)
flag = p.add_argument
flag('--ckpt', nargs='+', default=[],
     help='runs or student pipelines, a row each; none: newest of out/stage[12]*, else shipped')
flag('--teacher', action='store_true', help='score the base model (alone, or beside --ckpt)')
flag('--pipeline', default='',
     help='score this diffusers pipeline instead, by --teacher_steps and --cfg')
flag('--images', default='', help='score this folder of pictures instead')
flag('--recipe', choices=['', *RECIPES], default='', help="table of defaults; empty: the student's")
flag('--metrics', nargs='+', choices=METRICS, help='what to compute')
flag('--prompts', help='text file, one prompt per line')
flag('--n', type=int, default=0, help='how many of the prompts; 0: all')
flag('--steps', type=int, help="the student's sampling steps; default: those of the first")
flag('--teacher_steps', type=int, default=50, help="the teacher's sampling steps")
flag('--cfg', type=float, help="the teacher's guidance")
for name, (_, source, title, _) in R.SCORES.items():
    flag(f'--{name}', default=source, help=f'weights of {title}: hub id, folder or file')
flag('--real', help='real pictures for spectrum, cmmd and fid, as --data of train_stage1.py')
flag('--real_files', help='which files of --real, a pattern; empty: all')
flag('--image_column', help='column of the pictures in --real; empty: the one there is')
flag('--real_vae', default='',
     help='pipeline through whose VAE they pass for spectrum, so that its loss is not counted')
flag('--n_real', type=int, default=512, help='how many real pictures')
flag('--batch', type=int, default=16, help='pictures per call')
flag('--workers', type=int, default=2, help='threads per rank that read pictures')
flag('--seed', type=int, default=0, help='picture i depends on (seed, i) alone')
flag('--sheet', choices=['', *METRICS[:-3]], default='',
     help='draw the 16 best and the 16 worst pictures by this score, beside --out')
flag('--out', default='', help='JSON to write; empty: out/evaluate/ and a name by the settings')
chosen, _ = p.parse_known_args()
students = [m.find_student(ckpt) for ckpt in chosen.ckpt or ['']]
_, facts = students[0]
recipe = chosen.recipe or facts['recipe']
if recipe not in RECIPES:
    m.die(f'--ckpt: its recipe is {recipe!r}; give --recipe {" or ".join(RECIPES)}')
p.set_defaults(**RECIPES[recipe], steps=len(facts['steps']))
m.give_way(p, 'real', 'real_files', 'image_column')
args = p.parse_args()
m.at_least(args, n=0, steps=1, teacher_steps=1, batch=1, n_real=1, seed=0, workers=0, cfg=0)
m.at_most(args, steps=1000, teacher_steps=1000)
if args.sheet and args.sheet not in args.metrics:
    m.die(f'--sheet {args.sheet} is not among --metrics {" ".join(args.metrics)}; add it there')
rank, world, device = m.launch(minutes=120)
torch.set_grad_enabled(False)

# --------------------------------------------------------------------------------------------------
# what there is to do: prompts, files of --images, rows of the table, settings, networks that score

def own_prompt(file):
    """The prompt that A1111 or ComfyUI wrote into a PNG, else ''."""
    with contextlib.suppress(*m.BROKEN, *m.BAD_FILE):
        info = Image.open(file).info
        if 'parameters' in info:
            return re.split('(?:^|\n)(?:Negative prompt|Steps): ', info['parameters'])[0].strip()
        nodes = json.loads(info.get('prompt', '{}'))
        for node in nodes.values():
            value = node['inputs'].get('positive')
            while isinstance(value, list):                            # the node that it comes from
                inputs = nodes[value[0]]['inputs']
                names = 'text', 'text_g', 'positive', 'conditioning', 'value', 'string'
                value = next((inputs[name] for name in names if name in inputs), None)
            if isinstance(value, str):
                return value.strip()
    return ''

def tied(found, lines, given):
    """Pictures to prompts: (the number of each one's line, the prompts, the rule in words).
    given: --prompts was named."""
    texts = [own_prompt(file) for file in found]
    if all(texts):
        numbers = [lines.index(text) if text in lines else None for text in texts]
        if None not in numbers and len({*numbers}) == len(numbers):
            return numbers, lines, 'by the prompt inside each, a line of ' + args.prompts
        if not given:
            return range(len(texts)), texts, 'by the prompt inside each'
    groups = [[int(k) for k in re.findall('[0-9]+', file.stem)] for file in found]
    count = len(found)
    if not any(groups) and count == len(lines):
        return range(count), lines, 'by name order'
    # the places in a name, from its begin or its end, whose numbers count the pictures from 0 or 1
    rules = {}
    for place in range(min(map(len, groups))):
        for numbers in zip(*([group[place], group[-1 - place]] for group in groups)):
            least, most = min(numbers), max(numbers)
            whole = count == len(lines) if least else count <= len(lines)
            if whole and least in (0, 1) and sorted(numbers) == [*range(least, least + count)]:
                counted = tuple(number - least for number in numbers)
                rules[counted] = f'by the numbers {least} ... {most} in the names'
    if len(rules) != 1:
        why = 'more than one number in their names counts them' if rules else (
            f'no number in their names counts them, 0, 1, 2... or 1 ... {len(lines)}, each once')
        m.die(f'--images {args.images}: which of its {count} pictures belongs to which line of '
              f'{args.prompts} cannot be told: {why}; name them by their lines, from 0, or add a '
              'metadata.jsonl (file_name, text)')
    (numbers, rule), = rules.items()
    return numbers, lines, rule

source = Path(args.images, 'metadata.jsonl')
found, numbers = [], []
if args.images and source.exists():
    with m.sentence(f'--images: {source} must have a file_name and a text in every line'):
        entries = source.read_bytes().decode('utf-8-sig').split('\n')
        entries = [json.loads(line) for line in entries if line.strip()]
        found = [Path(args.images, entry['file_name']) for entry in entries]
        prompts = [entry['text'] for entry in entries]
        assert prompts and all(isinstance(text, str) for text in prompts), (
            'it is empty, or a text is no string')
    numbers, rule = range(len(found)), 'by metadata.jsonl'
else:
    source = Path(args.prompts)
    prompts = m.read_prompts(source, blank=True)
if args.images and not found:
    found = sorted(f for f in Path(args.images).glob('*') if f.suffix.lower() in m.PICTURES)
    if not found:
        m.die(f'--images {args.images} has no picture; give a folder of .png, .jpg or .webp files')
    lines = prompts
    numbers, prompts, rule = tied(found, lines, chosen.prompts)
    source = source if prompts is lines else Path(args.images).absolute()
n = args.n or min(len(prompts), 1 + max(numbers, default=len(prompts)))
files = {i: file for i, file in sorted(zip(numbers, found)) if i < n and prompts[i]}
if n > len(prompts):
    m.die(f'--n {n}: {source} has only {len(prompts)} prompts')
if args.images and not files:
    m.die(f'--images {args.images}: the first {n} lines of {source}, --n, are blank')
if args.images and rank == 0:
    print(f'--images {args.images}: {len(files)} pictures, {files[min(files)].name} ... '
          f'{files[max(files)].name}, {rule}, to prompts {min(files)} ... {max(files)}')
near = R.near_prompts(source, len(prompts), blank=True)

guided = []                                               # numbers of steps of the teacher's rows
rows = {}                              # label: (pipeline, its steps, its guidance, what loads it)
teacher, whence, t5 = facts['base_model'], '--ckpt', facts.get('t5')
merged = facts.get('base_lora')                       # [file, weight], in the teacher as it taught
if args.images:
    rows[args.images] = '', 0, 0., None
elif args.pipeline:
    teacher, whence, t5, merged = args.pipeline, '--pipeline', None, None
    guided = [args.teacher_steps]
else:
    if args.teacher and not args.ckpt:
        students = []
    for folder, own in students:
        load = functools.partial(m.load_student, folder, own)
        rows[f'{folder}, {args.steps} steps'] = str(folder), args.steps, 0., load
    if args.teacher or not args.ckpt:
        guided.append(args.teacher_steps)
    if not (args.teacher or args.ckpt):
        guided.append(args.steps)
for steps in guided:
    load = functools.partial(m.load_pipeline, teacher, whence, t5=t5, base_lora=merged)
    label = f'{teacher} with its base LoRA' if merged else teacher
    rows[f'{label}, {steps} steps, CFG {args.cfg:g}'] = teacher, steps, args.cfg, load

def short(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]

def sums(files):
    """Of weights and settings; a hub id has no files, and of one that is gone loading it tells."""
    return [m.crc(file) for file in files
            if file.suffix in ('.safetensors', '.json') and file.is_file()]

weights = {name: sums(sorted([*Path(name).rglob('*.*'), Path(name)]))
           for name, *_ in rows.values() if name}
if guided and merged:
    weights[teacher] += [*sums([Path(merged[0])]), merged[1]]
settings = {k: v for k, v in vars(args).items() if k not in ('out', 'batch', 'workers', 'sheet')}
settings |= dict(rows=list(rows), n=n, weights=weights, prompts_sha256=short(prompts),
                 iterations=[own['iteration'] for _, own in students])
out = Path(args.out or f'out/evaluate/{short(settings)}.json')
m.writable_folder(out.parent, '--out')
if out.exists():
    with m.sentence(f'--out {out} holds something else than this evaluation; choose another file'):
        assert json.loads(out.read_text())['settings'] == settings, 'its settings are others'
real = None
if {'spectrum', 'cmmd', 'fid'} & {*args.metrics}:
    real = m.Pictures(
        args.real, args.real_files, args.image_column, '', 0, args.seed, '--real', captioned=False)
    if rank == 0:
        print(real.said)
    n_real = min(args.n_real, len(real.rows))
m.quiet()
vae = None
if args.real_vae and 'spectrum' in args.metrics and rank == 0:
    own = m.load_pipeline(args.real_vae, '--real_vae', torch.float32, t5=False)
    vae, family = own.vae.to(device), m.family_of(own)
scorers, unavailable = {}, {}
for metric in args.metrics:
    name = 'clip' if metric in ('rprecision', 'margin', 'cmmd') else metric
    try:
        if name in R.SCORES and name not in scorers:
            scorers[name] = R.SCORES[name][0](vars(args)[name])
    except R.Unavailable as error:
        unavailable[metric] = f'{error}; --{name} takes another'
if not scorers and not {'sharpness', 'spectrum', 'fid'} & {*args.metrics}:
    m.die('none of --metrics could be had: ' + '; '.join(dict.fromkeys(unavailable.values())))
clip = scorers.get('clip')

# --------------------------------------------------------------------------------------------------
# pictures: made once, kept as PNG, and their scores

seconds = {}                                       # what this rank spent, and on how many pictures

@contextlib.contextmanager
def clocked(what, count):
    began = time.time()
    yield
    spent, before = seconds.get(what, (0, 0))
    seconds[what] = spent + time.time() - began, before + count

files_of = {label: files for label in rows}
for label, (name, steps, cfg, load) in rows.items():
    if args.images:
        break
    key = dict(source=name, weights=weights[name], steps=steps, cfg=args.cfg, seed=args.seed,
               device=device.type, prompts=settings['prompts_sha256'])
    folder = out.parent / 'pictures' / short(key)
    files_of[label] = {i: folder / f'{i:06d}.png' for i in range(n) if prompts[i]}
    missing = [i for i in range(rank, n, world)
               if prompts[i] and not files_of[label][i].exists()]
    if not missing:
        continue
    pipe = load().to(device)
    pipe.set_progress_bar_config(disable=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'settings.json').write_text(json.dumps(key, indent=1))
    for k in tqdm(range(0, len(missing), args.batch), label, disable=rank > 0):
        index = missing[k:k + args.batch]
        texts = [prompts[i] for i in index]
        with clocked(f'drawing: {label}', len(index)):
            pictures = m.generate(pipe, texts, index, args.seed, steps, cfg)
            for i, picture in zip(index, (pictures.clamp(0, 1) * 255).round().byte()):
                with m.replacing(files_of[label][i]) as tmp:
                    to_pil_image(picture).save(tmp, 'PNG')
    del pipe                                               # the scorers want the device's memory

def read(file):
    """A picture, uint8 (3, H, W), or None where it cannot be read."""
    with contextlib.suppress(*m.BROKEN):
        return pil_to_tensor(m.open_picture(file))

# threads: a process that is forked beside those of the process group may hang
readers = ThreadPoolExecutor(max(1, args.workers))

def opened(items):
    """[(index, file)] -> [(indices, uint8 (B, 3, H, W))], one for each size of the readable."""
    by_size = {}
    for (i, _), picture in zip(items, readers.map(read, [file for _, file in items])):
        if picture is not None:
            by_size.setdefault(picture.shape, {})[i] = picture
    return [(list(found), torch.stack([*found.values()])) for found in by_size.values()]

def score(index, x):
    """Pictures (B, 3, H, W) in [0, 1] -> a table: a row each, a column per score, 'vector' of CLIP
    and 'bands' of energy."""
    texts = [prompts[i] for i in index]
    found = pandas.DataFrame(index=index)
    for name, scorer in scorers.items():
        with clocked(name, len(index)):
            found[name] = scorer.score(x, texts).tolist()                   # waits for the device
    if clip:
        found['vector'] = [*clip.seen.cpu().numpy()]
    if 'sharpness' in args.metrics:
        found['sharpness'] = R.sharpness(x).tolist()
    if 'spectrum' in args.metrics:
        found['bands'] = [*R.log_spectrum(x).cpu().numpy()]
    return found

for scorer in scorers.values():
    scorer.to(device)
tables = {}                                            # {label: what score returns, by the index}
for label, paths in files_of.items():
    share = [(i, file) for i, file in paths.items() if i % world == rank]
    scored = []
    with clocked('scoring in all', len(share)):
        for k in tqdm(range(0, len(share), args.batch), f'scoring {label}', disable=rank > 0):
            for index, x in opened(share[k:k + args.batch]):
                scored.append(score(index, x.to(device).float() / 255))
    scored = sum(m.gathered(scored), [])
    if not scored:
        m.die(f'{label}: none of its {len(paths)} pictures can be read; give PNG, JPEG or WebP')
    tables[label] = pandas.concat(scored).sort_index()
truncated = {name: sum(m.gathered(scorer.truncated)) for name, scorer in scorers.items()}
if rank:                                                            # rank 0 alone does the rest
    m.gathered(None)
    m.leave()

# --------------------------------------------------------------------------------------------------
# the table: means and distances with bootstrap intervals

first, *_ = rows
if real:                                    # as large as the pictures that they are compared with
    real.size = min(Image.open(files_of[first][tables[first].index[0]]).size)

def photos():
    """The first n_real pictures of --real that can be used, (3, H, W) in [-1, 1], each once."""
    places, used, passed_over = range(len(real.rows)), 0, Counter()
    for k in range(0, len(places), args.batch):
        for pixels, _ in readers.map(real.at, places[k:k + args.batch]):
            if isinstance(pixels, str):
                passed_over[pixels] += 1
            elif used < n_real:
                used += 1
                yield pixels
        if used == n_real:
            break
    if passed_over:
        reasons = ', '.join(f'{count} {reason}' for reason, count in passed_over.items())
        print(f'--real {args.real}: {used} pictures used, passed over: {reasons} (small: a side '
              f'below {real.size // 2} px)')
    if not used:
        m.die(f'--real {args.real} has no picture that can be used; give larger or other ones')

if clip and 'cmmd' in args.metrics or 'spectrum' in args.metrics:
    real_vectors, real_bands = [], []
    left = iter(tqdm(photos(), 'real pictures', n_real))
    while x := [*itertools.islice(left, args.batch)]:
        x = torch.stack(x).to(device)
        if clip and 'cmmd' in args.metrics:
            real_vectors.append(clip.embed_images((x + 1) / 2).cpu())
        if vae:
            x = family.to_pixels(vae, family.to_latents(vae, x)).clamp(-1, 1)
        if 'spectrum' in args.metrics:
            real_bands.append(R.log_spectrum((x + 1) / 2).cpu())

def statistics(scored):
    """{metric: (1001,)}, its value and 1,000 of resampled pictures, the same for every row."""
    N = len(scored)
    drawn = torch.randint(N, (1000, N), generator=m.generator(args.seed, 2))
    share = torch.full((1000, N), 1 / N, dtype=torch.float64)
    w = torch.zeros_like(share).scatter_add_(1, drawn, share)
    found = {}
    for name in scored.columns.intersection(args.metrics):
        x = torch.tensor(scored[name].values)
        found[name] = torch.cat([x.mean()[None], w @ x])
    if clip and 'cmmd' in args.metrics:
        x = torch.from_numpy(np.stack(scored['vector']))                                  # (N, D)
        y = torch.cat(real_vectors)                                                       # (M, D)
        xx, xy, yy = R.kernel(x, x), R.kernel(x, y).mean(1), R.kernel(y, y).mean()
        value = 1000 * (xx.mean() - 2 * xy.mean() + yy)
        resampled = 1000 * ((w @ xx * w).sum(1) - 2 * w @ xy + yy)
        # a picture drawn twice is near itself: a bias
        found['cmmd'] = torch.cat([value[None], resampled - resampled.mean() + value])
    if 'spectrum' in args.metrics:
        x = torch.from_numpy(np.stack(scored['bands'])).double()                          # (N, 6)
        gap = torch.cat([x.mean(0)[None], w @ x]) - torch.cat(real_bands).double().mean(0)
        value, *resampled = gap.square().mean(1).sqrt()
        resampled = torch.stack(resampled)
        # noise of the mean adds to a distance: the same bias
        found['spectrum'] = torch.cat([value[None], resampled - resampled.mean() + value])
    return found

def summary(found):
    """{metric: (1001,)} -> {metric: its value and its 95 % interval}."""
    ends = torch.tensor([.025, .975], dtype=torch.float64)
    return {name: dict(value=x[0].item(), interval=x[1:].quantile(ends).tolist())
            for name, x in found.items()}

table, differences = {}, {}
for label, scored in tables.items():
    paths = files_of[label]
    for i in sorted(paths.keys() - scored.index):
        print(f'{paths[i]} cannot be read: left out')
    if clip and {'rprecision', 'margin'} & {*args.metrics}:
        vectors = torch.from_numpy(np.stack(scored['vector']))
        margin = R.margins(clip, vectors, scored.index, prompts, near, args.seed)
        scored['margin'] = margin.numpy()
        scored['rprecision'] = (margin >= 0).double().numpy()
    each = scored[scored.columns.intersection(args.metrics)].reset_index()
    table[label] = summary(statistics(scored)) | dict(
        n=len(scored), unreadable=len(paths) - len(scored), missing=n - len(paths),
        per_picture=each.to_dict('list'))
    if label != first and {*args.metrics} != {'fid'}:
        both = scored.index.intersection(tables[first].index)
        a, b = statistics(tables[first].loc[both]), statistics(scored.loc[both])
        differences[f'{first} minus {label}'] = summary({name: a[name] - b[name] for name in a})

if 'fid' in args.metrics:
    key = [args.real, args.real_files, args.image_column, args.seed, real.size]
    folder = out.parent / f'pictures/real-{short(key)}'
    folder.mkdir(parents=True, exist_ok=True)
    real_files = [folder / f'{i:06d}.png' for i in range(n_real)]
    if not all(file.exists() for file in real_files):
        for file, pixels in zip(real_files, tqdm(photos(), 'real pictures', n_real)):
            with m.replacing(file) as tmp:
                to_pil_image(((pixels + 1) * 127.5).round().byte()).save(tmp, 'PNG')
        real_files = [file for file in real_files if file.exists()]
    try:
        for label, scored in tables.items():
            made = [files_of[label][i] for i in scored.index]
            value = R.fid(made, real_files, device, args.batch)
            table[label]['fid'] = dict(value=value)
    except R.Unavailable as error:
        unavailable['fid'] = str(error)

TITLES = {name: score[2:] for name, score in R.SCORES.items()} | dict(
    rprecision=('R-precision', '{:.1%}'), margin=('margin', '{:.2f}'),
    sharpness=('sharpness', '{:.2f}'), spectrum=('spectrum', '{:.3f}'),
    cmmd=('CMMD', '{:.3f}'), fid=('FID', '{:.2f}'))

def line(*cells):
    print('|', ' | '.join(cells), '|')

line('', *(TITLES[name][0] for name in args.metrics), 'pictures')
line(*['---'] * (len(args.metrics) + 2))
for label, row in (table | differences).items():
    cells = []
    for name in args.metrics:
        form, entry = TITLES[name][1].format, row.get(name)
        cells.append(form(entry['value']) if entry else '-')
        if entry and 'interval' in entry:
            cells[-1] += ' [{}, {}]'.format(*map(form, entry['interval']))
    line(label, *cells, str(row.get('n', '')))
for label, values in PAPER.get(recipe, {}).items():
    values = dict(zip(PUBLISHED, values))
    line(f'paper: {label}', *(values.get(name, '-') for name in args.metrics), '10,000 of COCO')
judges = ', '.join(f'{TITLES[name][0]} {vars(args)[name]}' for name in scorers)
if judges:
    print(f'judges, of --recipe {recipe}: {judges}')
if 'cmmd' in args.metrics and not args.clip.rstrip('/').endswith('-336'):
    print(f'CMMD: by {args.clip}; the one of 2401.09603 is by {R.CLIP_L}-336 (--clip), on another '
          'scale')
for name, why in unavailable.items():
    print(f'{TITLES[name][0]}: {why}')
for name, count in truncated.items():
    if count:
        print(f'{TITLES[name][0]}: {count} prompts were longer than its text encoder and cut, '
              'all rows together')
for k, (label, scored) in enumerate(tables.items()):
    if args.sheet in scored:
        scored = scored.sort_values(args.sheet, ascending=False, kind='stable')
        scored = scored.drop(scored.index[16:-16])
        pictures = [m.open_picture(files_of[label][i]) for i in scored.index]
        pictures = [pil_to_tensor(ImageOps.fit(picture, (256, 256))) for picture in pictures]
        values = map(TITLES[args.sheet][1].format, scored[args.sheet])
        captions = [f'{value} {prompts[i]}' for value, i in zip(values, scored.index)]
        sheet = out.with_name(f'{out.stem}-{args.sheet}-{k}.png')
        m.picture_grid([torch.stack(pictures) / 127.5 - 1], captions, sheet)
        print(f'{sheet}: the 16 best and the 16 worst of {label}')
with m.replacing(out) as tmp:
    tmp.write_text(json.dumps(dict(
        settings=settings, rows=table, differences=differences, unavailable=unavailable,
        truncated=truncated, seconds=seconds,
        device=torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu',
        **m.versions()), indent=1))
print(out)
m.gathered(None)
m.leave()
