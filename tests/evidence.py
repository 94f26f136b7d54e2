"""
Evidence: what the papers claim, and what the miniature shows of it.

    python tests/evidence.py                       # whatever is not done yet; hours on 2 cores
    python tests/evidence.py --only texture cost   # the cells of these claims
    python tests/evidence.py --seeds 1             # a first look
    python tests/evidence.py --write               # only the tables and pictures, of what is there
    python tests/evidence.py --tune flash dmd2     # trials, on other prompts and another seed
    python tests/evidence.py --leaderboard         # CPU seconds to the scores of GOAL

A cell is a run of a training script as a user types it, scored by evaluate.py on 1,024 prompts
drawn anew and the same noise. A claim is a difference of two cells: its mean over training seeds
with its standard error. Shown: the 95 % interval by Student's t, which is wide for few seeds
(3: 4.3 standard errors, 5: 2.8), lies on the claim's side. Killed at any moment, the same command
goes on; a cell amid which it was begins anew. Tables go into assets/results.md between two marks;
beside it evidence.json has every cell's scores, and evidence-CLAIM.png a picture for each claim.
What evidence.json has is not run again, so another machine can do the rest; a row taken out of it
is.
"""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import model as m                                                                      # noqa: E402

METRICS = dict(pickscore=('PickScore', '.4f'), cmmd=('CMMD', '.3f'), spectrum=('spectrum', '.3f'),
               sharpness=('sharpness', '.2f'), margin=('margin', '.2f'),
               rprecision=('R-precision', '.3f'))
LOWER = 'cmmd', 'spectrum'                                                            # is better

# --------------------------------------------------------------------------------------------------
# cells: script, flags, iterations at which it is scored (0: as it was found). An iteration updates
# the fake score; it updates the student as well, but with --ttur N one in N does

ONE, TWO = 'train_stage1.py', 'train_stage2.py'
SHIPPED, TOY, TOY_SD3 = 'assets/toy/student', 'assets/toy/sdxl', 'assets/toy/sd3'
FLASH = ['--recipe', 'toy']
DMD2 = ['--recipe', 'toy-dmd2']
PIXEL = ['--gan', 'pixel']
# before --tune chose the rates and weights of both recipes
UNTUNED = ['--student_lr', '1e-4', '--gan_weight']
TTUR_1 = ['--ttur', '1', '--warmup', '6', '--cooldown', '20']
DMDR = ['--recipe', 'toy-dmdr']
PICTURES = ['--reward', 'pickscore', '--gan', 'none']
REFL = ['--rl', 'refl', '--goal', '1', *PICTURES]
GRPO = ['--rl', 'grpo', *PICTURES]
ADVDMD = ['--rl', 'grpo', '--reward', 'discriminator', '--ttur', '1']
ALONE = ['--no-joint', '--gan', 'none']
SHORT = ['--warmup', '5']                                      # 60 updates of the student
# a reward of weight 0: all that the student learns is DM's
DM_ALONE = [*SHORT, *REFL, '--reward_weight', '0']
SD3 = ['--recipe', 'toy-sd3']
FLAT = ['--cooldown', '0']                                     # of a curve
CELLS = {
    'untrained': (ONE, [*FLASH, '--student_lr', '0'], [1]),
    'flash': (ONE, FLASH, [300]),
    'dm': (ONE, [*FLASH, '--gan', 'none'], [300]),
    'flash, uncoupled': (ONE, [*FLASH, '--couple', '1'], [300]),
    'flash, crop': (ONE, [*FLASH, '--gan_crop', '32'], [300]),
    'dmd2': (ONE, DMD2, [900]),
    'flash, untuned': (ONE, [*FLASH, *UNTUNED, '.1'], [300]),
    'dm, untuned': (ONE, [*FLASH, *UNTUNED, '.1', '--gan', 'none'], [300]),
    'dmd2, untuned': (ONE, [*DMD2, *UNTUNED, '5e-3'], [900]),
    # the paper's ablation: A pixel GAN, B TTUR 1, C split; 180 updates of the student each, and the
    # same sum of learning rates
    '+A': (ONE, [*DMD2, *PIXEL], [900]),
    '+B': (ONE, [*DMD2, *TTUR_1], [180]),
    '+A+B': (ONE, [*DMD2, *PIXEL, *TTUR_1], [180]),
    '+A+B+C': (ONE, [*DMD2, *PIXEL, *TTUR_1, '--split'], [180]),
    'flash, ttur 2': (ONE, [*FLASH, '--ttur', '2', *FLAT], [200, 600]),
    'dmd2, ttur 2': (ONE, [*DMD2, '--ttur', '2', *FLAT], [200, 600]),
    # DMDR's cold start, 200 updates of the student
    'dmdr': (ONE, DMDR, [1000]),
    'dmdr, no DynaDG': (ONE, [*DMDR, '--dyna', '0'], [1000]),
    'dmdr, no DynaRS': (ONE, [*DMDR, '--renoise', 'uniform'], [1000]),
    'dmdr, neither': (ONE, [*DMDR, '--dyna', '0', '--renoise', 'uniform'], [1000]),
    # stage 2 from the shipped student, 300 updates
    'shipped': (TWO, [], [0]),
    'joint': (TWO, [], [330]),
    'joint, no gan': (TWO, ['--gan', 'none'], [330]),
    'joint, x 5': (TWO, ['--rl_lr', '5e-4'], [330]),
    'alone, x 5': (TWO, [*ALONE, '--rl_lr', '5e-4'], [300]),
    'joint, all steps': (TWO, ['--rl_steps', 'all'], [330]),
    'joint, 1:1': (TWO, ['--rl_ratio', '1'], [330]),
    'joint, 10:1': (TWO, ['--rl_ratio', '10'], [330]),
    # from a whole network, the cell flash's of the same seed; as many preference updates
    'flash, then joint': (TWO, [], [330]),
    'flash, then joint, x 5': (TWO, ['--rl_lr', '5e-5'], [510]),
    'flash, then alone, x 5': (TWO, [*ALONE, '--rl_lr', '5e-5'], [400]),
    # three papers, 60 updates
    'pairs, 60': (TWO, SHORT, [90]),
    'pairs alone, 60': (TWO, [*SHORT, *ALONE], [60]),
    'refl, 60': (TWO, [*SHORT, *REFL], [90]),
    # at the joint run's rate, --student_lr
    'refl alone, 2e-4, 60': (TWO, [*SHORT, *REFL, '--no-joint', '--rl_lr', '2e-4'], [60]),
    'grpo, 60': (TWO, [*SHORT, *GRPO], [90]),
    'grpo alone, 60': (TWO, [*SHORT, *GRPO, '--no-joint'], [60]),
    'advdmd, 60': (TWO, [*SHORT, *ADVDMD], [90]),
    'advdmd, random D, 60': (TWO, [*SHORT, *ADVDMD, '--heads_lr', '0'], [90]),
    'advdmd alone, 60': (TWO, [*SHORT, *ADVDMD, '--no-joint'], [60]),
    'DM alone, 60': (TWO, DM_ALONE, [90]),
    # on the toy SD3, from the student of the first; the pairs' reward is PickScore as well
    'sd3': (ONE, SD3, [300]),
    'sd3 pairs, 60': (TWO, [*SD3, *SHORT], [90]),
    'sd3 refl, 60': (TWO, [*SD3, *SHORT, *REFL], [90]),
    'sd3 grpo, 60': (TWO, [*SD3, *SHORT, *GRPO], [90]),
    'sd3 advdmd, 60': (TWO, [*SD3, *SHORT, *ADVDMD], [90]),
    'sd3 DM alone, 60': (TWO, [*SD3, *DM_ALONE], [90]),
}
# rows that no training seed changes: flags of evaluate.py
ROWS = {
    'teacher, 50 steps': ['--pipeline', TOY, '--teacher_steps', '50'],
    'teacher, 4 steps': ['--pipeline', TOY, '--teacher_steps', '4'],
    'teacher, 4 steps, trailing': ['--pipeline', 'TRAILING', '--teacher_steps', '4'],
    'sd3 teacher, 28 steps': ['--pipeline', TOY_SD3, '--teacher_steps', '28'],
}
FIVE_SEEDS = 'flash', 'dmd2'                                                   # the headline pair
ONE_SEED = 'untrained', 'shipped', 'sd3'
# standard errors of a 95 % interval, by the number of seeds
STUDENT_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57}

def claim(words, metric, better, other):
    """better and other: a cell, or (cell, iteration)."""
    last = {name: its[-1] for name, (*_, its) in CELLS.items()} | dict.fromkeys(ROWS, 0)
    sides = [side if isinstance(side, tuple) else (side, last[side]) for side in (better, other)]
    return SimpleNamespace(words=words, metric=metric, sides=sides)

def by(metrics, words, *sides):
    return [claim(words, metric, *sides) for metric in metrics]

PRIMARY = 'pickscore', 'cmmd', 'spectrum'
UNSEEN = 'cmmd', 'spectrum', 'margin'                          # by a reward of PickScore
CLAIMS = {
    'stage 1': by((*PRIMARY, 'margin'), 'stage 1 is better than the weights with which it begins',
                  'flash', 'untrained'),
    'papers': [
        *by(['pickscore'], 'ReFL raises its reward', 'refl, 60', 'shipped'),
        *by(UNSEEN, 'DMDR: ReFL joint is better than alone', 'refl, 60',
            'refl alone, 2e-4, 60'),
        *by(UNSEEN, 'DMDR: GRPO joint is better than alone', 'grpo, 60', 'grpo alone, 60'),
        *by(['pickscore'], 'ReFL raises it more than GRPO', 'refl, 60', 'grpo, 60'),
        *by(['pickscore'], 'GRPO raises its reward', 'grpo, 60', 'shipped'),
        *by(['pickscore'], 'and more than DM alone does', 'grpo, 60', 'DM alone, 60'),
        *by(['pickscore', 'cmmd'], 'AdvDMD is better than DM alone', 'advdmd, 60', 'DM alone, 60'),
        *by(['pickscore', 'cmmd'], 'than a random D', 'advdmd, 60', 'advdmd, random D, 60'),
        *by(['pickscore', 'cmmd'], "than Flash-DMD's pairs", 'advdmd, 60', 'pairs, 60'),
        *by(['pickscore', 'cmmd'], 'AdvDMD joint is better than alone', 'advdmd, 60',
            'advdmd alone, 60'),
        *by(PRIMARY, "Flash-DMD's pairs are better than DM alone", 'pairs, 60', 'DM alone, 60'),
        *by(UNSEEN, "Flash-DMD's pairs joint are better than alone", 'pairs, 60',
            'pairs alone, 60')],
    'papers on sd3': [
        *by(['pickscore'], 'ReFL raises its reward', 'sd3 refl, 60', 'sd3'),
        *by(['pickscore'], 'and more than DM alone does', 'sd3 refl, 60', 'sd3 DM alone, 60'),
        *by(UNSEEN, 'and by what it does not see', 'sd3 refl, 60', 'sd3 DM alone, 60'),
        *by(['pickscore'], 'GRPO raises its reward', 'sd3 grpo, 60', 'sd3'),
        *by(['pickscore'], 'and more than DM alone does', 'sd3 grpo, 60', 'sd3 DM alone, 60'),
        *by(['pickscore'], 'Pairs raise their reward', 'sd3 pairs, 60', 'sd3'),
        *by(['pickscore', 'cmmd'], 'and are better than DM alone', 'sd3 pairs, 60',
            'sd3 DM alone, 60'),
        *by(['pickscore', 'cmmd'], 'AdvDMD is better than DM alone', 'sd3 advdmd, 60',
            'sd3 DM alone, 60')],
    'hacking': [
        *by((*PRIMARY, 'margin'), 'RL alone, five times as hard, hacks; joint does not',
            'flash, then joint, x 5', 'flash, then alone, x 5'),
        *by((*PRIMARY, 'margin'), 'of adapters', 'joint, x 5', 'alone, x 5'),
        *by(['pickscore'], 'joint RL raises PickScore, which it does not see', 'joint', 'shipped'),
        *by(['cmmd', 'spectrum'], 'and by what it does not see', 'joint', 'shipped'),
        *by(PRIMARY, 'without the pixel GAN joint RL is worse', 'joint', 'joint, no gan')],
    'teacher': [
        *by((*PRIMARY, 'margin'), 'stage 2 is better than 50 guided steps of the teacher',
            'flash, then joint', 'teacher, 50 steps'),
        *by((*PRIMARY, 'margin'), 'and than stage 1', 'flash, then joint', 'flash'),
        *by((*PRIMARY, 'margin'), 'stage 1 is better than four of the teacher', 'flash',
            'teacher, 4 steps')],
    'noise': [
        *by(['pickscore', 'cmmd'], 'preferences at high noise are better than at all steps',
            'joint', 'joint, all steps'),
        *by(['pickscore', 'cmmd'], '5:1 is better than 1:1', 'joint', 'joint, 1:1'),
        *by(['pickscore', 'cmmd'], 'and than 10:1', 'joint', 'joint, 10:1')],
    'texture': [
        *by(['spectrum', 'sharpness'], 'DM alone is poor in texture', 'flash', 'dm'),
        *by(['cmmd', 'pickscore'], 'and worse by the other measures', 'flash', 'dm'),
        *by(['spectrum', 'sharpness', 'cmmd', 'pickscore'], 'untuned, by all', 'flash, untuned',
            'dm, untuned')],
    'cost': [
        *by(PRIMARY, 'Flash-DMD is ahead of DMD2 in equal time, both tuned', 'flash', 'dmd2'),
        *by(PRIMARY, 'and untuned', 'flash, untuned', 'dmd2, untuned')],
    'cold start': [
        *by(['pickscore', 'cmmd'], "DMDR's two aids help", 'dmdr', 'dmdr, neither'),
        *by(['pickscore', 'cmmd'], 'DynaDG does', 'dmdr', 'dmdr, no DynaDG'),
        *by(['pickscore', 'cmmd'], 'DynaRS does', 'dmdr', 'dmdr, no DynaRS')],
    'parts': [
        *by(PRIMARY, '+A, the pixel GAN alone, helps DMD2', '+A', 'dmd2'),
        *by(PRIMARY, '+B, TTUR 1 alone, does', '+B', 'dmd2'),
        *by(PRIMARY, '+A+B+C does', '+A+B+C', 'dmd2'),
        *by(PRIMARY, 'C, the split, makes +A+B work', '+A+B+C', '+A+B')],
    'ttur': [
        claim('DMD2 at TTUR 2 gets worse', 'pickscore', ('dmd2, ttur 2', 200), 'dmd2, ttur 2'),
        claim('Flash-DMD at TTUR 2 gets better', 'pickscore', 'flash, ttur 2',
              ('flash, ttur 2', 200))],
    'coupling': by(PRIMARY, 'the coupling helps', 'flash', 'flash, uncoupled'),
    'crop': by(['rprecision', 'pickscore', 'cmmd', 'spectrum'], 'a GAN on a quarter of the picture '
               'is worse', 'flash', 'flash, crop'),
}
# --tune: every cell of it the same trials; the second is times .1, of DMD2's head 5e-3
TRIALS = dict(student_lr=[2.5e-5, 5e-5, 1e-4], gan_weight=[.3, 1., 3.])
GOAL = dict(pickscore=.675, spectrum=.2)

# --------------------------------------------------------------------------------------------------
# running

p = m.parser(__doc__)
flag = p.add_argument
flag('--only', nargs='+', choices=CLAIMS, default=[*CLAIMS], help='claims whose cells are run')
flag('--seeds', type=int, default=4, help='training seeds of a cell; from 3 on five of the '
     'headline pair')
flag('--jobs', type=int, default=1 if torch.cuda.is_available() else min(8, os.cpu_count()),
     help='cells at a time; CPU: a core each')
flag('--tune', nargs='+', choices=CELLS, default=[], help='cells of which TRIALS are run')
flag('--leaderboard', action='store_true', help='the page as it stands, until it reaches GOAL')
flag('--write', action='store_true', help='train nothing')
flag('--work', default='out/evidence', help='folder of runs and scores, which are kept')
flag('--results', default='assets/results.md', help='page of the tables; pictures go beside it')
args = p.parse_args()
m.at_least(args, seeds=1, jobs=1)
work = m.writable_folder(ROOT / args.work, '--work')
m.writable_folder((ROOT / args.results).parent, '--results')
scores_file = (ROOT / args.results).with_name('evidence.json')
committed = json.loads(scores_file.read_text()) if scores_file.exists() else {}
environment = os.environ | dict(OMP_NUM_THREADS=str(max(1, os.cpu_count() // args.jobs)))

def run(*command):
    """A script; returns the CPU seconds of its processes. Its words go to --work/log.txt."""
    with (work / 'log.txt').open('a') as log:
        process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=log,
                                   stderr=subprocess.STDOUT, env=environment)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f'{" ".join(map(str, command))} failed: see {work / "log.txt"}')
    return used.ru_utime + used.ru_stime

def slug(*words):
    return '-'.join(map(str, words)).replace(', ', '-').replace(' ', '_').replace(':', 'to')

def kept(name, seed, it):
    """The file of a cell's scores, {'cpu': seconds, metric: value} as far as they are there."""
    return work / 'scores' / f'{slug(name, seed, it)}.json'

def found_in(file):
    """What is known of a cell or trial: by its file, else by evidence.json."""
    return json.loads(file.read_text()) if file.exists() else committed.get(file.stem, {})

def keep(file, **values):
    file.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(file.read_text()) if file.exists() else {}
    with m.replacing(file) as tmp:
        tmp.write_text(json.dumps(found | values, indent=1))

def student(name, seed, it):
    """The folder of a cell's student at an iteration."""
    return ROOT / SHIPPED if not it else work / 'students' / slug(name, seed, it)

def train(name, seed, more=(), label=None, again=False):
    """A cell with one seed; its students are set aside, its state is not kept."""
    script, flags, its = CELLS[name]
    label = label or name
    if not again and all(found_in(kept(label, seed, it)) for it in its):
        return
    out, spent, start = work / 'runs' / slug(label, seed), 0., []
    if script == TWO:
        first = start_of(name, seed)
        with first_ones:
            if not student(*first).exists():
                train(*first[:2], again=True)
        start = ['--init', student(*first), '--eval_every', 0]
    m.remove(out)                             # killed amid it: anew, as its CPU seconds are unknown
    for it in its:
        if it:
            spent += run(script, *flags, *more, *start, '--seed', seed, '--iters', it,
                         '--sample_every', 0, '--workers', 1, '--out', out)
            folder = student(label, seed, it)
            folder.parent.mkdir(exist_ok=True)
            with m.replacing(folder) as tmp:
                shutil.copytree(out / 'student', tmp)
        log = out / 'log.jsonl'
        keep(kept(label, seed, it), cpu=spent, commit=m.commit()[:9],
             cosine=cosines(log) if it else {})
        print(f'{label}, seed {seed}, {it} iterations: {spent:.0f} CPU s', flush=True)
    for state in out.glob('state-*'):
        m.remove(state)

def start_of(name, seed):
    """Where a cell of stage 2 begins, as student() takes it."""
    if name.startswith('flash'):
        return 'flash', seed, 300
    if base_of(CELLS[name][1]) == TOY_SD3:
        return 'sd3', 0, 300
    return 'shipped', 0, 0

def base_of(flags):
    """The teacher's pipeline of a cell or row."""
    return TOY_SD3 if {SD3[1], TOY_SD3} & {*flags} else TOY

def evaluated(of, prompts, n, *rows, base=TOY):
    """[{metric: value}] of evaluate.py's rows, which are made by the flags `rows`; base: the
    teacher's pipeline."""
    file = work / f'evaluate-{of}.json'
    file.unlink(missing_ok=True)
    run('evaluate.py', '--recipe', 'toy', '--prompts', prompts, '--n', n, '--n_real', 2048,
        '--real', data, '--real_files', 'test.parquet', '--real_vae', base, '--seed', 77, '--batch',
        32, '--out', file, *rows, '--metrics', *METRICS)
    found = json.loads(file.read_text())['rows']
    return [{key: row[key]['value'] for key in METRICS} for row in found.values()]

def score(wanted, of=0):
    """Scores cells, [(name, seed, it)], those that are not: one call, one look at real pictures."""
    wanted = [x for x in wanted if 'pickscore' not in found_in(kept(*x))]
    for base in TOY, TOY_SD3:
        own = [x for x in wanted if base_of(CELLS[x[0]][1]) == base]
        students = [student(*x) for x in own]
        found = []
        if own:
            found = evaluated(of, data / 'prompts.txt', 1024, '--ckpt', *students, base=base)
        for x, values in zip(own, found, strict=True):
            keep(kept(*x), **values)

def seeds_of(name):
    if name in ONE_SEED:
        return [0]
    return range(max(5, args.seeds) if name in FIVE_SEEDS and args.seeds > 2 else args.seeds)

def cells(names):
    """Cells of these claims, in their order."""
    sides = [side for name in names for c in CLAIMS[name] for side, _ in c.sides]
    return [*dict.fromkeys(side for side in sides if side in CELLS)]

# --------------------------------------------------------------------------------------------------
# tables

everything = {}                                                # what read_all() found

def read_all():
    """{file's name: values} of all that is scored, of cells and trials: by evidence.json beside the
    results' page and, in its place, by --work."""
    found = dict(committed)
    for own in [*work.glob('scores/*.json'), *work.glob('trials/*.json')]:
        row = json.loads(own.read_text())
        if 'pickscore' in row:
            found[own.stem] = row
    return dict(sorted(found.items()))

def scored(name, it):
    """{seed: {metric: value}} of what is scored."""
    files = {seed: kept(name, seed, it).stem for seed in range(100)}
    return {seed: everything[file] for seed, file in files.items() if file in everything}

def spread(values):
    """Mean and the standard error of the mean, which one value has not."""
    values = [*values]
    return mean(values), stdev(values) / len(values) ** .5 if len(values) > 1 else math.nan

def shown(values, form, sign=''):
    middle, error = spread(values)
    return f'{middle:{sign}{form}}' + (f' ({error:{form}})' if error == error else '')

def verdict(c):
    """A claim's row: both values, the difference with its standard error, and what it shows."""
    left, right = (scored(*side) for side in c.sides)
    title, form = METRICS[c.metric]
    if len(right) == 1 and c.sides[1][0] in (*ONE_SEED, *ROWS):
        right = dict.fromkeys(left, right[0])
    seeds = left.keys() & right.keys()
    if not seeds:
        return None
    # the same seed has the same prompts and noise in training
    sign = -1 if c.metric in LOWER else 1
    gaps = [sign * (left[seed][c.metric] - right[seed][c.metric]) for seed in seeds]
    gap, error = spread(gaps)
    least = STUDENT_T.get(len(gaps), 2.5) * error
    said = 'shown' if gap > least else 'opposite' if gap < -least else 'not shown'
    values = [f'{mean(row[seed][c.metric] for seed in seeds):{form}}' for row in (left, right)]
    names = [f'{name}, {it}' if 'ttur' in name else name for name, it in c.sides]
    return (c.words, title, *(f'{name}: {value}' for name, value in zip(names, values)),
            shown(gaps, form, '+'), str(len(seeds)), said if error == error else 'one seed')

def table(head, rows):
    return ['', *('| ' + ' | '.join(row) + ' |' for row in (head, ['---'] * len(head), *rows))]

def cosines(log):
    """{step: [mean, lowest, highest]} of a run's cosine between the gradients of DM and GAN."""
    found = {}
    for line in map(json.loads, log.read_text().splitlines()):
        for key, value in line.items():
            if key.startswith('grad/cos/'):
                found.setdefault(key.split('/')[-1], []).append(value)
    return {t: [mean(values), min(values), max(values)] for t, values in found.items()}

def conflict(name):
    """The rows of a cell's cosines, by step, over its seeds."""
    runs = [row.get('cosine', {}) for row in scored(name, CELLS[name][2][-1]).values()]
    rows = []
    for t in sorted({t for run in runs for t in run}, key=int, reverse=True):
        means, lowest, highest = zip(*(run[t] for run in runs))
        rows.append([t, *(f'{x:+.3f}' for x in (mean(means), min(lowest), max(highest)))])
    return rows

def ranked(trials):
    """Trials by cell, the chosen first: each with the sum of its ranks, from 1, within its cell."""
    cells = {}
    for row in trials:
        cells.setdefault(row['cell'], []).append(dict(row, ranks=0))
    for rows in cells.values():
        for key in PRIMARY:
            rows.sort(key=lambda row: row[key], reverse=key not in LOWER)
            for rank, row in enumerate(rows, 1):
                row['ranks'] += rank
        rows.sort(key=lambda row: (row['ranks'], -row['pickscore']))
    return [row for rows in cells.values() for row in rows]

def page():
    """The section of the results' page, as lines."""
    lines = [BEGIN, '', '`python tests/evidence.py`: 1,024 prompts and 2,048 real pictures, drawn '
             'anew (`make_toy.py --only data --seed 1`), and the same noise in every row.', '',
             '- Figures: the mean over training seeds (its standard error).',
             '- Difference: of runs with the same seed, above 0 where the side named first is '
             'better.',
             "- Shown: its 95 % interval, by Student's t, is above 0; opposite: below 0.",
             '- The errors are of training seeds alone. All rows have the same prompts, and those '
             'that begin at one student have it in common. Other prompts move a difference as '
             'well: by +- .0010 in PickScore, .009 in CMMD, .033 in spectrum, .14 in margin (95 %, '
             "evaluate.py's interval for seed 0 of refl, 60 and refl alone).",
             '- Nothing is corrected for the number of rows: where there is no difference, one row '
             'in twenty comes out shown or opposite.']
    rows = [(f'`{name}`', *row) for name in CLAIMS for row in map(verdict, CLAIMS[name]) if row]
    head = ['--only', 'claim', 'by', 'its side', 'the other', 'difference', 'seeds', '']
    lines += table(head, rows)
    rows = []
    for name, its in (dict.fromkeys(ROWS, [0]) | {k: v[2] for k, v in CELLS.items()}).items():
        for it in its:
            found = [*scored(name, it).values()]
            if found:
                values = (shown((row[key] for row in found), form)
                          for key, (_, form) in METRICS.items())
                cpu = mean(row['cpu'] for row in found)
                rows.append([name, str(it), *values, f'{cpu:.0f}', str(len(found))])
    head = ['cell', 'iterations', *(title for title, _ in METRICS.values()), 'CPU s', 'seeds']
    lines += table(head, rows)
    lines += table(['cell', 'command'], (
        [name, f'`python {" ".join([script, *flags])} --iters {its[-1]}`']
        for name, (script, flags, its) in CELLS.items()
        if its[-1] and any(scored(name, it) for it in its)))
    lines += ['', 'Those of train_stage2.py with `--init '
              f'{SHIPPED} --eval_every 0`, the shipped student; of "flash, then ..." with that of '
              'the cell flash of the same seed, of SD3 with that of the cell sd3, both without '
              "their state: fake score and discriminator are new, the GAN weight is stage 2's own, "
              '.1. All with `--sample_every 0 --seed N --workers 1`. CPU s: of training, all '
              'threads.']
    if conflict('+A+B'):
        lines += ['', 'Cosine between the gradients of DM and of the pixel GAN at one and the same '
                  'sample of the student (cell +A+B, all logged iterations):']
        lines += table(['step', 'mean', 'lowest', 'highest'], conflict('+A+B'))
    trials = ranked(row for row in everything.values() if 'cell' in row)
    if trials:
        lines += ['', 'Trials (`--tune`), seed 100, on the 256 prompts of assets/toy/data. The '
                  'least sum of the ranks by the three measures is chosen, of equals by PickScore:']
        lines += table(['cell', 'flags', *(METRICS[key][0] for key in PRIMARY), 'ranks'], (
            [x['cell'], x['flags'], *(f'{x[key]:{METRICS[key][1]}}' for key in PRIMARY),
             str(x['ranks'])]
            for x in trials))
    for name in CLAIMS:
        sheet = (ROOT / args.results).with_name(f'evidence-{slug(name)}.png')
        if sheet.exists():
            left, right = (side for side, _ in CLAIMS[name][0].sides)
            lines += ['', f'![{left}, over {right}]({sheet.name})', '', f'{left}, over {right}.']
    return [*lines, '', END]

BEGIN, END = '<!-- tests/evidence.py writes from here -->', '<!-- to here -->'

def draw(name, sheet):
    """Both sides of a claim's first row, the same prompts and noise, as far as they are there."""
    rows = []
    for side, it in CLAIMS[name][0].sides:
        ckpt, how = student(side, 0, it), []
        if side in ROWS:
            if ROWS[side][1] != TOY:            # sample.py draws the teacher of the shipped student
                return
            ckpt, how = ROOT / SHIPPED, ['--teacher', '--steps', ROWS[side][-1]]
        if not ckpt.exists():
            return
        picture = work / f'{slug(side, it)}.png'
        run('sample.py', '--ckpt', ckpt, *how, '--n', 8, '--seed', 77, '--out', picture)
        rows.append(Image.open(picture).convert('RGB'))
    both = Image.new('RGB', (rows[0].width, sum(row.height for row in rows)), 'white')
    for k, row in enumerate(rows):
        both.paste(row, (0, k * rows[0].height))
    both.save(sheet)

def write():
    """Draws the pictures; puts the tables between the marks of the results' page, or at its end."""
    everything.update(read_all())
    file = ROOT / args.results
    with m.replacing(scores_file) as tmp:
        rows = (f'{json.dumps(key)}: {json.dumps(row)}' for key, row in everything.items())
        tmp.write_text('{' + ',\n'.join(rows) + '}\n')
    for name in args.only:
        draw(name, file.with_name(f'evidence-{slug(name)}.png'))
    before, _, rest = (file.read_text() if file.exists() else '').partition(BEGIN)
    _, _, after = rest.partition(END)
    with m.replacing(file) as tmp:
        tmp.write_text(before.rstrip('\n') + '\n\n' + '\n'.join(page()) + (after or '\n'))
    print(file)

# --------------------------------------------------------------------------------------------------

data = work / 'data/data'
if not (data.exists() or args.write):
    run('tests/make_toy.py', '--only', 'data', '--seed', 1, '--held_out', 2048, '--pictures', 2048,
        '--out', data.parent, '--work', work / 'data/work')
pool, first_ones = ThreadPoolExecutor(args.jobs), threading.Lock()
if args.leaderboard:
    each = []
    for seed in range(3):
        out, spent, it, found = work / f'leaderboard-{seed}', 0., 0, {}
        m.remove(out)                                 # of the page as it stood, or amid its seconds
        while not found or any((found[k] - GOAL[k]) * (-1 if k in LOWER else 1) < 0 for k in GOAL):
            it += 50
            spent += run(ONE, *FLASH, *FLAT, '--seed', seed, '--iters', it, '--sample_every', 0,
                         '--out', out)
            found, = evaluated(0, data / 'prompts.txt', 1024, '--ckpt', out)
            print(f'seed {seed}, {it} iterations, {spent:.0f} CPU s:',
                  {k: round(found[k], 4) for k in GOAL}, 'of', GOAL, flush=True)
        each.append(spent)
    print(f'{mean(each):.0f} CPU s ({min(each):.0f} to {max(each):.0f}), commit {m.commit()}')
elif args.tune:
    def trial(job):
        name, lr, factor = job
        flags = CELLS[name][1]
        weight = 5e-3 if 'toy-dmd2' in flags and 'pixel' not in flags else .1
        more = ['--student_lr', f'{lr:g}', '--gan_weight', f'{factor * weight:g}']
        label = slug('tune', name, f'{lr:g}', f'{factor:g}')
        file = work / f'trials/{label}.json'
        if not found_in(file):
            train(name, 100, more, label)
            found, = evaluated(label, 'assets/toy/data/prompts.txt', 256, '--ckpt',
                               student(label, 100, CELLS[name][2][-1]), base=base_of(flags))
            keep(file, cell=name, flags=' '.join(more), **found)
        print(json.dumps(found_in(file)), flush=True)
    [*pool.map(trial, itertools.product(args.tune, *TRIALS.values()))]
elif not args.write:
    trailing = work / 'trailing'                       # the teacher, its four steps from t = 999
    if not trailing.exists():
        with m.replacing(trailing) as tmp:
            shutil.copytree(ROOT / TOY, tmp)
            file = tmp / 'scheduler/scheduler_config.json'
            found = json.loads(file.read_text()) | dict(timestep_spacing='trailing')
            file.write_text(json.dumps(found))
    jobs = ['untrained', *cells(args.only)]
    # one seed of everything first, so that the page has a row of each as early as can be
    for seed in range(max(5, args.seeds)):
        todo = [(name, seed) for name in jobs if seed in seeds_of(name)]
        [*pool.map(lambda job: train(*job), todo)]
        found = [(name, seed, it) for name, seed in todo for it in CELLS[name][2]]
        share = [found[k::args.jobs] for k in range(args.jobs)]
        [*pool.map(score, share, range(args.jobs))]
        write()
    for name, flags in ROWS.items():
        if not found_in(kept(name, 0, 0)):
            flags = [trailing if x == 'TRAILING' else x for x in flags]
            found, = evaluated(0, data / 'prompts.txt', 1024, *flags, base=base_of(flags))
            keep(kept(name, 0, 0), cpu=0, **found)
    write()
else:
    write()
