"""
The real scripts on the CPU: ranks, micro-batches, resume, export, tables, bad input, and how the
pages are written.

    pytest tests/test_scripts.py
"""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from PIL import Image, ImageFilter, PngImagePlugin
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

import model as m
from conftest import (
    ENV, ROOT, differences, equal, far_from_one_step, inside, listing, refused, rows, start,
    weights)

SCRIPTS = ['model.py', 'train_stage1.py', 'train_stage2.py', 'rewards.py', 'evaluate.py',
           'sample.py']
SMALL = ['--batch', 4, '--micro', 4, '--warmup', 0, '--cooldown', 0, '--sample_every', 0,
         '--log_every', 1, '--workers', 1]
TRAIN = ['train_stage1.py', *SMALL, '--iters', 4, '--save_every', 2, '--heads_lr', 3e-4]
STUDENT = 'assets/toy/student'

def largest_difference(a, b, kind=''):
    """Of two states, in the keys with `kind` in them."""
    assert a.keys() == b.keys() and a
    return max((a[k].float() - b[k].float()).abs().max().item() for k in a if kind in k)

def well(done):
    """A finished script that must have ended well."""
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done

def stamps(*folders):
    """{file: its size and time of writing}, but for the lock."""
    files = [f for folder in folders for f in folder.rglob('*') if f.is_file()]
    files = [f for f in files if f.name != '.lock']
    return {f: (f.stat().st_size, f.stat().st_mtime_ns) for f in files}

@pytest.fixture(scope='session')
def plain(tmp_path_factory):
    """The uninterrupted run of one process that the others are compared with; no recipe is named,
    so it is the toy's where there is no GPU."""
    out = tmp_path_factory.mktemp('runs') / 'plain'
    done = well(start(*TRAIN, '--sample_every', 4, '--out', out))
    out.with_name('said').write_text(done.stdout)
    return out

# --------------------------------------------------------------------------------------------------
# how the pages are written

def blocks(script):
    """{title: text} of a script: from a line `# -- TITLE ---` to the next rule."""
    found, title = {}, ''
    for line in (ROOT / script).read_text().splitlines():
        if re.match(' *# --', line):
            title = ''.join(re.findall('# -- (.+?) -+$', line))
        found.setdefault(title, []).append(line)
    return {title: '\n'.join(lines).strip() for title, lines in found.items()}

def test_what_both_stages_do_stands_in_both_word_for_word():
    one, two = blocks('train_stage1.py'), blocks('train_stage2.py')
    one.pop('')
    for words in ('flags of the distillation', 'ranks, device, folder', 'data', 'networks', 'split',
                  'pictures to look at', 'pieces of an iteration', 'one distillation', 'the end'):
        assert any(words in title for title in one), words
    for title, text in one.items():
        assert text == two[title], title
    assert '\n'.join(one.values()).count('\n') > 250

@pytest.mark.parametrize('script', [
    *SCRIPTS, *(f'tests/{file.name}' for file in ROOT.glob('tests/*.py'))])
def test_house_style(script):
    """No line over 100 columns, no statement that is a tuple, no text times a bool."""
    text = (ROOT / script).read_text()
    assert not [line for line in text.splitlines() if len(line) > 100]
    for node in ast.walk(ast.parse(text)):
        assert not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Tuple)), node.lineno
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            sides = node.left, node.right
            words = [x for x in sides if isinstance(x, (ast.JoinedStr, ast.List))
                     or isinstance(x, ast.Constant) and isinstance(x.value, str)]
            conditions = [x for x in sides if isinstance(x, (ast.Compare, ast.BoolOp))
                          or isinstance(x, ast.UnaryOp) and isinstance(x.op, ast.Not)
                          or isinstance(x, ast.Call) and ast.unparse(x.func) == 'bool']
            assert not (words and conditions), node.lineno

def test_the_method_stands_on_the_pages():
    for script in SCRIPTS:
        assert not re.search(r'class (Run|Distillation|\w*Trainer)\b', (ROOT / script).read_text())
    for script in ('train_stage1.py', 'train_stage2.py'):
        assert 'backward(' in (ROOT / script).read_text()

@pytest.mark.parametrize('script', ['train_stage1.py', 'train_stage2.py'])
def test_the_loop_leaves_alone_what_functions_read(script):
    """A page is one scope: a name that the loop gave away would be another thing in them."""
    page = ast.parse((ROOT / script).read_text())
    loop, = (node for node in page.body if isinstance(node, ast.For) and node.orelse == []
             and 'args.iters + 1' in ast.unparse(node.iter))
    given = {node.id for node in ast.walk(loop) if isinstance(node, ast.Name)
             and isinstance(node.ctx, ast.Store)}
    functions = [node for node in page.body if isinstance(node, ast.FunctionDef)]
    assert len(functions) > 5
    for function in functions:
        names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
        own = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        own |= {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
        assert not ({node.id for node in names} - own) & given, function.name

# --------------------------------------------------------------------------------------------------
# the tables of evidence

def test_what_evidence_calls_shown(tmp_path):
    """By Student's t over paired seeds, which 3.8 standard errors of three are not, nor 2.5 of six;
    lower is better for a distance. The rest of the page stays, and what was written there before
    goes. Another machine's work, the second here, adds to what the first one found."""
    page, works = tmp_path / 'results.md', [tmp_path / 'work', tmp_path / 'other']
    values = dict(cmmd=.1, sharpness=9., margin=1., rprecision=.8, cpu=60.)
    new = tmp_path / 'new/page.md'
    well(inside('tests/evidence.py', '--write', '--work', tmp_path / 'work', '--results', new))
    assert new.read_text().count('writes from here') == 1

    def put(work, cell, its, pickscore, spectrum):
        (work / 'scores').mkdir(parents=True, exist_ok=True)
        for seed, (p, s) in enumerate(zip(pickscore, spectrum)):
            row = values | dict(pickscore=p, spectrum=s, cosine={'249': [s, 0., 1.]})
            (work / f'scores/{cell}-{seed}-{its}.json').write_text(json.dumps(row))

    put(works[0], 'flash', 300, [.70, .71, .72], [.20, .21, .22])
    put(works[0], 'dmd2', 900, [.69, .70, .9], [.25, .23, .25])
    put(works[0], 'dm', 300, [.69], [.1])
    put(works[1], 'dmd2', 900, [.69, .70, .705], [.25, .23, .25])
    put(works[1], 'shipped', 0, [.67], [.3])
    put(works[1], 'joint', 330, [.66, .665, .662], [.3] * 3)
    put(works[1], '+A+B', 180, [.6, .7], [.1, .2])
    put(works[1], 'dmdr', 1000, [.7213, .7013] * 3, [.2] * 6)
    put(works[1], 'dmdr-neither', 1000, [.7] * 6, [.2] * 6)
    # a trial that is second by each measure is chosen before two that are first by one, last by two
    (works[1] / 'trials').mkdir()
    for lr, scores in {'1': (.7, .3, .3), '2': (.69, .2, .2), '3': (.68, .1, .4)}.items():
        row = values | dict(zip(('pickscore', 'cmmd', 'spectrum'), scores), cell='flash', flags=lr)
        (works[1] / f'trials/tune-flash-{lr}.json').write_text(json.dumps(row))
    page.write_text('# Measured\n')
    for work in works:
        done = well(inside('tests/evidence.py', '--write', '--work', work, '--results', page))
        text = page.read_text()
        page.write_text(text + 'more\n')
    table = [line.strip('| ').split(' | ') for line in text.splitlines() if line.startswith('|')]
    said = {(row[1], row[2]): row[5:] for row in table if len(row) == 8 and row[0][0] == '`'}
    cost = 'Flash-DMD is ahead of DMD2 in equal time, both tuned'
    assert said[cost, 'PickScore'] == ['+0.0117 (0.0017)', '3', 'shown']
    assert said[cost, 'spectrum'] == ['+0.033 (0.009)', '3', 'not shown']
    assert said['DM alone is poor in texture', 'spectrum'] == ['-0.100', '1', 'one seed']
    raised = 'joint RL raises PickScore, which it does not see', 'PickScore'
    assert said[raised] == ['-0.0077 (0.0015)', '3', 'opposite']
    assert ['249', '+0.150', '+0.000', '+1.000'] in table
    assert said["DMDR's two aids help", 'PickScore'] == ['+0.0113 (0.0045)', '6', 'not shown']
    ranks = [(row[1], row[5]) for row in table if row[0] == 'flash' and len(row) == 6]
    assert ranks == [('2', '5'), ('1', '6'), ('3', '7')]
    assert text.startswith('# Measured\n') and text.endswith('to here -->\nmore\n')
    assert text.count('writes from here') == 1

    # what is called DM alone has no other gradient; ReFL is alone at the rate at which it is joint
    lines, _ = second(tmp_path / 'dm', *done.page['DM_ALONE'], '--iters', 2, '--critic_warmup', 0)
    assert [row.get('grad/reward') for row in lines] == [0, 0]
    assert all(row['grad/dm'] > 0 for row in lines)
    _, flags, _ = done.page['CELLS']['refl alone, 2e-4, 60']
    args = refused(TWO, '--init', STUDENT, *flags, '--clamp', 1).page['args']
    assert args.rl_lr == args.student_lr

def test_seconds_are_those_of_the_whole_run(tmp_path, monkeypatch):
    """A leaderboard, and a cell that was killed between its marks, begin anew where an earlier run
    left something: the page may have been edited since, or its seconds are unknown."""
    (tmp_path / 'data/data').mkdir(parents=True)
    names = 'cmmd', 'spectrum', 'sharpness', 'margin', 'rprecision'
    values = dict.fromkeys(names, dict(value=0.))
    rows = dict(a=values | dict(pickscore=dict(value=.7)))

    def process(command, **how):
        out = Path(command[command.index('--out') + 1])
        if command[1] == 'evaluate.py':
            out.write_text(json.dumps(dict(rows=rows)))
        else:
            begun.setdefault(out.name, (out / 'left').exists())
            inits.append(Path(command[command.index('--init') + 1] if '--init' in command else ''))
            (out / 'student').mkdir(parents=True, exist_ok=True)
            (out / 'left').touch()
            (out / 'log.jsonl').touch()
        return SimpleNamespace(pid=0)

    begun, inits, used = {}, [], SimpleNamespace(ru_utime=5., ru_stime=1.)
    monkeypatch.setattr(subprocess, 'Popen', process)
    monkeypatch.setattr(os, 'wait4', lambda *_: (0, 0, used))
    monkeypatch.setattr(m, 'commit', lambda: 'x')
    for _ in range(2):
        begun.clear()
        done = well(inside('tests/evidence.py', '--leaderboard', '--work', tmp_path, '--results',
                           tmp_path / 'page.md'))
        assert '6 CPU s (6 to 6)' in done.stdout
        assert begun == {f'leaderboard-{seed}': False for seed in range(3)}
    begun.clear()
    (tmp_path / 'runs/dmd2-ttur_2-0').mkdir(parents=True)
    (tmp_path / 'runs/dmd2-ttur_2-0/left').touch()
    done.page['keep'](done.page['kept']('dmd2, ttur 2', 0, 200), cpu=6.)
    done.page['train']('dmd2, ttur 2', 0)
    assert begun == {'dmd2-ttur_2-0': False}
    found = [json.loads(done.page['kept']('dmd2, ttur 2', 0, it).read_text()) for it in (200, 600)]
    assert [row['cpu'] for row in found] == [6, 12]
    # a cell of stage 2 begins at the student that its table names
    for name, seed in (('flash, then joint', 1000), ('sd3 pairs, 60', 1000), ('joint', 1000)):
        done.page['train'](name, seed)
    assert [path for path in inits if path.name] == [
        tmp_path / 'students/flash-1000-300', tmp_path / 'students/sd3-0-300',
        ROOT / 'assets/toy/student']
    assert begun['flash-1000'] == begun['sd3-0'] == False                # which are trained first

# --------------------------------------------------------------------------------------------------
# the same result, any way

def test_two_ranks_with_two_micro_batches_each_are_one_process(plain, tmp_path):
    well(start(*TRAIN, '--micro', 1, '--out', tmp_path / 'run', ranks=2))
    one, two = weights(plain, 4), weights(tmp_path / 'run', 4)
    assert {k.split('.')[0] for k in one} == {'student', 'fake', 'heads'}
    assert not far_from_one_step(two, one, weights(plain, 2))

def test_micro_batch_does_not_matter(plain, tmp_path):
    well(inside(*TRAIN, '--micro', 2, '--iters', 2, '--out', tmp_path / 'run'))
    run = weights(tmp_path / 'run', 2)
    assert not far_from_one_step(run, weights(plain, 2), weights(plain, 4))

def test_check_goes_through_it_all_and_leaves_nothing(tmp_path):
    command = [*TRAIN, '--check', '--batch', 2, '--out', f'{tmp_path}/run/']
    (tmp_path / 'run-check').mkdir()
    (tmp_path / 'run-check/mine.txt').write_text('not of a check')
    assert 'run-check, which has files that no check wrote' in said_no(refused(*command))
    assert (tmp_path / 'run-check/mine.txt').exists()
    (tmp_path / 'run-check/args.json').write_text('{"check": true}')            # killed
    done = well(inside(*command))
    assert re.search(r'plan: [\d.]+ GB a rank', done.stdout)
    assert '    1/1  saved, ' in done.stdout
    assert 'checked in' in done.stdout.splitlines()[-1]
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('gigabytes, flags, recipe', [
    (16., [], 'toy'), (150., [], 'sdxl'), (24., ['--lora', '64', '--gan_crop', '512'], 'sdxl')])
def test_cards_that_cannot_hold_sdxl_get_the_toy(gigabytes, flags, recipe, monkeypatch, capsys):
    """By the flags that are given; and nothing of SDXL's recipe stays among the defaults."""
    done = inside('train_stage1.py', '--recipe', 'toy', '--batch', 0)          # the page up to here
    parser, recipes = done.page['p'], done.page['RECIPES']
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(m, 'card', lambda device: gigabytes)
    monkeypatch.setattr(sys, 'argv', ['train_stage1.py', *flags])
    before = dict(parser._defaults)
    assert m.default_recipe(parser, recipes) == recipe
    assert parser._defaults == before
    assert ('the toy in its place' in capsys.readouterr().out) == (recipe == 'toy')

def test_rates_belong_to_what_is_trained():
    """Whole networks or adapters, whichever the recipe is not for; a flag goes over either."""
    for recipe, flags, rates in (
            ('sd3', [], (3e-5, 3e-5)), ('sd3', ['--lora', 0], (1e-6, 1e-6)),
            ('toy', ['--lora', 4], (1e-3, 2e-3)),
            ('toy-sd3', ['--lora', 0, '--fake_lr', 1], (1e-4, 1))):
        args = refused(ONE, '--recipe', recipe, *flags, '--batch', 0).page['args']
        assert (args.student_lr, args.fake_lr) == rates

def test_resumed_is_uninterrupted_bit_for_bit(plain, tmp_path):
    """Stopped by SIGKILL somewhere after the save at 2, then the same command again: weights,
    moments and log."""
    out = tmp_path / 'run'
    command = [sys.executable, *map(str, TRAIN), '--out', str(out)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.time() + 300
    while not (out / 'state-0000002').exists() and time.time() < until:
        time.sleep(.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [state.name for state in m.states_of(out)] == ['state-0000002']
    (out / 'state-0000003.tmp').mkdir()                          # a save that the kill cut short
    with (out / 'log.jsonl').open('a') as file:                  # beyond the save, and half a line
        file.write('{"iteration": 3}\n{"iteration": 4, "fa')
    done = well(start(*TRAIN, '--out', out))
    assert 'of iteration 2' in done.stdout
    assert equal(weights(plain, 4), weights(out, 4))
    assert not list(out.glob('*.tmp'))
    lines, calm = rows(out), rows(plain)
    assert [line['iteration'] for line in lines] == [1, 2, 3, 4]
    for line, other in zip(lines, calm):
        for row in (line, other):
            del row['seconds'], row['memory']
        assert line == other

def test_what_a_run_leaves_behind(plain):
    """And a finished run that is started again says that it is, and touches nothing."""
    names = {f.name for f in plain.iterdir()}
    assert names >= {
        'args.json', 'log.jsonl', 'curves.png', 'samples-0000000.png', 'samples-0000004.png',
        'state-0000002', 'state-0000004', 'student'}
    args = json.loads((plain / 'args.json').read_text())
    assert {'torch', 'diffusers'} <= args['versions'].keys() and 'commit' in args
    assert '"batch": 4' in (plain / 'student/README.md').read_text()
    lines = rows(plain)
    for key in ('fake', 'gan/d', 'gan/g', 'gan/real', 'gan/made', 'grad/dm', 'grad/gan',
                'norm/student', 'seconds', 'memory', 'dropped', 'data/broken', 'data/cut'):
        assert all(np.isfinite(row[key]) for row in lines), key
    times = {k for row in lines for k in row if k.startswith('dm/')}
    assert times <= {'dm/999', 'dm/749', 'dm/499'}
    before = stamps(plain)
    for flags in [], ['--seed', 7, '--cfg', 2, '--no-split']:
        done = well(inside(*TRAIN, *flags, '--out', plain))
        assert 'is finished, at 4 of 4 iterations, and nothing is changed' in done.stdout
        assert stamps(plain) == before

def test_two_runs_in_one_folder(plain):
    """The second says who has it and ends, on all ranks; the first loses nothing. When that is
    gone, its name in the lock file means nothing."""
    hold = ('import fcntl, sys, time; f = open(sys.argv[1], "a+"); fcntl.lockf(f, fcntl.LOCK_EX); '
            'f.truncate(0); f.write("process 7 on moon"); f.flush(); print(1, flush=True); '
            'time.sleep(99)')
    holder = subprocess.Popen(
        [sys.executable, '-c', hold, plain / '.lock'], stdout=subprocess.PIPE, text=True)
    before = stamps(plain)
    try:
        holder.stdout.readline()
        done = start(*TRAIN, '--micro', 1, '--iters', 6, '--out', plain, ranks=2)
    finally:
        holder.kill()
        holder.wait()
    assert done.stderr.count('error: --out') == 1
    assert f'--out {plain} is in use by another run, process 7 on moon; wait' in done.stderr
    assert 'another rank is lost' not in done.stderr
    assert done.returncode and stamps(plain) == before
    assert 'is finished' in well(inside(*TRAIN, '--out', plain)).stdout
    assert re.fullmatch(r'process \d+ on .+', (plain / '.lock').read_text())

def test_every_recipe_has_a_folder_of_its_own():
    """So that README's commands work one after another."""
    assert m.default_out(1, '') == 'out/stage1'
    assert m.default_out(2, 'sd3') == 'out/stage2-sd3'

@pytest.mark.parametrize('flags, said', [
    (['--recipe', 'toy-dmd2'], '--gan latent --gan_weight 0.015 --split False --ttur 5 --couple 1'),
    (['--recipe', 'toy-dmd2', '--gan', 'pixel'], '--gan pixel --gan_weight 0.3 --split False'),
    (['--gan', 'latent'], '--gan latent --gan_weight 0.005 --split True'),
    (['--gan', 'none'], '--gan none'),
    (['--no-split'], '--split False'),
    (['--recipe', 'toy-dmdr', '--steps', 2], '--fake_lora 32 --dyna 0.5 --dyna_iters 200')])
def test_ablations_run(flags, said, tmp_path):
    """And what they change is printed, the latent GAN's weight among it. DMDR's aids fade by half a
    cosine of student updates, five iterations each."""
    done = well(inside(
        'train_stage1.py', *SMALL, '--batch', 2, '--micro', 2, '--iters', 2, *flags, '--out',
        tmp_path / 'run'))
    assert said in done.stdout
    lines = rows(tmp_path / 'run')
    assert [row['dropped'] for row in lines] == [0, 0]
    assert ('gan/d' in lines[0]) == ('none' not in flags and 'toy-dmdr' not in flags)
    # with --ttur 5 the student learns in the first iteration alone
    assert ['grad/dm' in row for row in lines] == [True, '--ttur 5' not in done.stdout]
    if 'toy-dmdr' in flags:
        found = [done.page['fading'](5 * k) for k in (0, 50, 100, 150, 200, 300)]
        assert found == pytest.approx([1, .8536, .5, .1464, 0, 0], abs=1e-4)
        assert found[-1] == 0

def test_own_data_alone_suffices_and_its_troubles_are_counted(tmp_path):
    """A folder of pictures with captions beside them, half of them broken, in the log and at the
    end, over all ranks; and stage 2 goes on with it. Some more flags that change what is
    computed."""
    folder = tmp_path / 'pictures'
    folder.mkdir()
    for i in range(6):
        Image.new('RGB', (64, 64), (40 * i, 0, 0)).save(folder / f'{i}.png')
        (folder / f'{i}.txt').write_text(f'picture {i} ' * (1 + 60 * (i == 5)))
    for i in (1, 2):
        (folder / f'{i}.png').write_bytes(b'not a picture')
    (folder / '4.txt').unlink()
    run = tmp_path / 'run'
    done = well(start(
        'train_stage1.py', *SMALL, '--batch', 2, '--micro', 1, '--iters', 3, '--data', folder,
        '--grad_checkpointing', '--gan_crop', 32, '--save_dtype', 'float32', '--offload',
        '--out', run, ranks=2))
    said = f'--data {folder}: 6 pictures in the column image, captions in text\n'
    assert said in done.stdout
    samples = [m.Pictures(str(folder), '', '', '', 64, 0)[i] for i in range(6)]
    found = sum((sample['trouble'] for sample in samples), Counter())
    found['cut'] = sum(len(sample['text']) > 77 for sample in samples)
    assert min(found.values()) > 0 and found.keys() == {'broken', 'uncaptioned', 'cut'}
    last = rows(run)[-1]
    assert {name: last[f'data/{name}'] for name in m.TROUBLE} == {
        name: found[name] for name in m.TROUBLE}
    words = f'{found["broken"]} broken, {found["uncaptioned"]} uncaptioned, {found["cut"]} cut'
    assert f'pictures passed over and captions cut: {words};' in done.stdout
    unet = load_file(run / 'student/unet/diffusion_pytorch_model.safetensors')
    assert {w.dtype for w in unet.values()} == {torch.float32}
    _, done = second(tmp_path / 'two', '--iters', 1, '--eval_every', 1, '--eval_n', 2, init=run)
    assert said in done.stdout
    assert len(done.page['photos']) == 6                # CMMD's are its own as well

# --------------------------------------------------------------------------------------------------
# sample

@pytest.mark.parametrize('steps, said', [
    (1, 'a subset of'), (2, 'a subset of'), (4, 'its own steps'), (8, 'a finer grid')])
def test_sample_any_number_of_steps(steps, said, tmp_path):
    done = well(inside(
        'sample.py', '--ckpt', STUDENT, '--steps', steps, '--n', 3, '--batch', 2, '--out',
        tmp_path / 's.png'))
    assert said in done.stdout
    assert 's per picture in the first call' in done.stdout
    assert Image.open(tmp_path / 's.png').size[0] > 300

def test_sample_teacher_prompt_and_prompts_file(tmp_path):
    """And a prompt of 100,000 characters is cut, in the text encoder and under the picture."""
    (tmp_path / 'p.txt').write_text('a red circle on blue\n\na green ring on black\n')
    (tmp_path / 'long.txt').write_text('a red circle on blue ' * 5_000)
    for flags, said in (
            (['--teacher'], '50 steps of EulerDiscreteScheduler, guidance 3.0'),
            (['--teacher', '--steps', 3, '--cfg', 2], '3 steps of EulerDiscreteScheduler, guida'
             'nce 2.0'),
            (['--prompts', tmp_path / 'p.txt'], ''), (['--prompt', 'a red star on white'], ''),
            (['--prompts', tmp_path / 'long.txt'], '')):
        (tmp_path / 's.png').unlink(missing_ok=True)
        done = well(inside(
            'sample.py', '--ckpt', STUDENT, *flags, '--n', 2, '--out', tmp_path / 's.png'))
        assert Image.open(tmp_path / 's.png').size[1] < 400
        assert said in done.stdout

def test_sample_finds_the_newest_run(plain, tmp_path):
    """A true start, from another folder."""
    for name in ('model.py', 'sample.py', 'assets'):
        (tmp_path / name).symlink_to(ROOT / name)
    assert STUDENT in inside('sample.py', '--n', 1, cwd=tmp_path).stdout
    (tmp_path / 'empty').mkdir()
    assert STUDENT in well(inside(
        ROOT / 'sample.py', '--n', 1, '--ckpt', STUDENT, cwd=tmp_path / 'empty')).stdout
    (tmp_path / 'out/stage1').mkdir(parents=True)
    (tmp_path / 'out/stage1/student').symlink_to(plain / 'student')
    assert 'out/stage1/student' in well(start('sample.py', '--n', 1, cwd=tmp_path)).stdout
    (tmp_path / 'out/stage1').rename(tmp_path / 'out/stage1-sd3')
    assert 'out/stage1-sd3/student' in well(inside('sample.py', '--n', 1, cwd=tmp_path)).stdout
    assert (tmp_path / 'samples.png').exists()

def test_sample_is_plain_diffusers(plain, tmp_path):
    """sample.py's grid holds the pictures that diffusers alone makes from the saved folder with the
    same generators."""
    prompts = ['a red star on white'] * 2
    well(inside(
        'sample.py', '--ckpt', plain, '--prompt', prompts[0], '--n', 2, '--out',
        tmp_path / 's.png'))
    pipe = diffusers.DiffusionPipeline.from_pretrained(plain / 'student', dtype=torch.float32)
    images = pipe(prompts, num_inference_steps=4, guidance_scale=0., output_type='pt',
                  generator=[m.generator(0, i) for i in range(2)]).images
    m.picture_grid([images * 2 - 1], prompts, tmp_path / 'ours.png')
    a, b = (np.asarray(Image.open(tmp_path / f).convert('RGB')).astype(int)
            for f in ('s.png', 'ours.png'))
    assert np.abs(a - b).max() <= 1

# --------------------------------------------------------------------------------------------------
# evaluate

def table(*flags, ranks=0, out=None):
    """What evaluate.py writes for the shipped student on 12 prompts, and what it prints."""
    command = ['evaluate.py', '--ckpt', STUDENT, '--n', 12, '--n_real', 64, '--out', out, *flags]
    done = well(start(*command, ranks=ranks) if ranks else inside(*command))
    assert '| R-precision |' in done.stdout
    return json.loads(out.read_text()), done.stdout

TEACHER = ['--teacher', '--teacher_steps', 3]

@pytest.fixture(scope='session')
def evaluated(tmp_path_factory):
    out = tmp_path_factory.mktemp('evaluated') / 'a.json'
    return out, *table(*TEACHER, '--batch', 5, '--sheet', 'pickscore', out=out)

def test_evaluate_does_not_depend_on_batch_or_ranks(evaluated, tmp_path):
    one = evaluated[1]
    two, _ = table(*TEACHER, '--batch', 16, ranks=2, out=tmp_path / 'b.json')
    assert len(one['rows']) == 2
    assert one['rows'].keys() == two['rows'].keys()
    assert one['settings'] == two['settings']
    assert 'torch' in one['versions'] and 'commit' in one
    assert "CMMD: by assets/toy/clip; the one of 2401.09603 is by" in evaluated[2]
    for label, row in one['rows'].items():
        other = two['rows'][label]
        assert row['rprecision'] == other['rprecision']
        for metric, close in (('clip', 1e-2), ('pickscore', 1e-4), ('cmmd', 1e-3)):
            assert abs(row[metric]['value'] - other[metric]['value']) < close
            assert np.allclose(row[metric]['interval'], other[metric]['interval'], atol=close)
        each, others = row['per_picture'], other['per_picture']
        assert each['index'] == others['index'] == list(range(12))
        assert np.allclose(each['pickscore'], others['pickscore'], atol=1e-4)

def test_intervals_are_those_of_a_mean_and_of_paired_differences(evaluated):
    """The bootstrap's, beside mean -+ 1.96 standard errors."""
    _, result, _ = evaluated
    ours, theirs = result['rows'].values()
    a, b = (np.array(row['per_picture']['clip']) for row in (ours, theirs))
    difference, = result['differences'].values()
    for entry, x in ((ours['clip'], a), (difference['clip'], a - b)):
        low, high = entry['interval']
        width = 2 * 1.96 * x.std() / len(x) ** .5
        assert abs(entry['value'] - x.mean()) < 1e-4
        assert low < x.mean() < high
        assert .75 * width < high - low < 1.25 * width

def test_pictures_are_not_made_twice(evaluated):
    """A killed run: some pictures are there, one is gone. The rest are left alone and the table is
    the same."""
    out, result, said = evaluated
    pictures = sorted(out.parent.glob('pictures/*/*.png'))
    assert len(pictures) == 24
    assert f'{out.parent}/a-pickscore-0.png' in said
    gone = np.array(Image.open(pictures[3])).astype(int)
    before = stamps(out.parent / 'pictures')
    pictures[3].unlink()
    again, _ = table(*TEACHER, '--batch', 5, out=out)
    after = stamps(out.parent / 'pictures')
    assert {f for f in pictures if after[f] != before[f]} == {pictures[3]}
    # alone in its batch: rounding
    assert np.abs(np.array(Image.open(pictures[3])).astype(int) - gone).max() <= 1
    for label, row in result['rows'].items():
        for k in ('clip', 'pickscore', 'cmmd'):
            assert abs(again['rows'][label][k]['value'] - row[k]['value']) < 1e-3

def test_a_student_is_scored_at_its_own_steps(tmp_path):
    altered(ROOT / STUDENT, tmp_path / 'two', 'student.json', dict(steps=[999, 499]))
    done = well(inside('evaluate.py', '--ckpt', tmp_path / 'two', '--n', 1,
                       '--metrics', 'sharpness', '--out', tmp_path / 'a.json'))
    assert f'| {tmp_path}/two, 2 steps |' in done.stdout

def test_a_pipeline_has_the_guidance_of_its_row(tmp_path):
    """Also one whose scheduler is a student's."""
    altered(ROOT / 'assets/toy/sdxl', tmp_path / 'lcm', 'model_index.json',
            dict(scheduler=['diffusers', 'LCMScheduler']))
    found = []
    for cfg in 0, 3:
        done = well(inside('evaluate.py', '--pipeline', tmp_path / 'lcm', '--teacher_steps', 2,
                           '--cfg', cfg, '--n', 1, '--metrics', 'sharpness', '--out',
                           tmp_path / f'{cfg}.json'))
        assert f'2 steps, CFG {cfg} |' in done.stdout
        row, = json.loads((tmp_path / f'{cfg}.json').read_text())['rows'].values()
        found.append(row['sharpness']['value'])
    assert abs(found[0] - found[1]) > .1

def test_a_metric_without_weights_leaves_the_others(tmp_path):
    """Also that any pipeline can be scored."""
    result, said = table(
        '--pipeline', 'assets/toy/sdxl', '--teacher_steps', 2, '--metrics', 'rprecision', 'hpsv2.1',
        'fid', 'pickscore', out=tmp_path / 'a.json')
    assert list(result['rows']) == ['assets/toy/sdxl, 2 steps, CFG 3']
    row, = result['rows'].values()
    assert row.keys() >= {'rprecision', 'pickscore'}
    assert not row.keys() & {'hpsv2.1', 'fid', 'clip'}
    assert result['unavailable'].keys() == {'hpsv2.1', 'fid'}
    assert 'HPSv2.1: xswu/HPSv2 could not be' in said
    assert 'FID: ' in said

def test_the_papers_rows_stand_below_sdxls(evaluated, tmp_path):
    folder = next(evaluated[0].parent.glob('pictures/*/000000.png')).parent
    done = well(inside(
        'evaluate.py', '--images', folder, '--recipe', 'sdxl', '--prompts',
        'assets/toy/data/prompts.txt', '--metrics', 'clip', 'mps', '--clip', 'assets/toy/clip',
        '--out', tmp_path / 'a.json'))
    row = '| paper: Flash-DMD stage 1, 64 x 1000 | - | 12.67 | 10,000 of COCO |'
    assert row in done.stdout
    assert 'paper' not in evaluated[2]

def test_real_pictures_score_as_real(tmp_path):
    """Held-out pictures beside their own captions: near-perfect R-precision, CMMD near nothing.
    Swapped captions: not. Names tie pictures to prompts by number or by metadata.jsonl; an
    unreadable one is named and left out."""
    held = datasets.load_dataset(
        'parquet', data_files=str(ROOT / 'assets/toy/data/test.parquet'), split='train')[:64]
    (tmp_path / 'pictures').mkdir()
    for i, image in enumerate(held['image']):
        image.save(tmp_path / f'pictures/{i}.png')               # 10.png before 2.png in name order
    results = {}

    def run(name):
        done = well(inside(
            'evaluate.py', '--images', tmp_path / 'pictures', '--recipe', 'toy', '--prompts',
            tmp_path / f'{name}.txt', '--out', tmp_path / f'{name}.json'))
        results[name], = json.loads((tmp_path / f'{name}.json').read_text())['rows'].values()
        return done.stdout

    first, *others = held['text']
    (tmp_path / 'own.txt').write_text('\n'.join(held['text']))
    (tmp_path / 'swapped.txt').write_text('\n'.join([*others, first + ' and more words' * 20]))
    run('own')
    assert '1 prompts were longer than its text encoder and cut' in run('swapped')
    (tmp_path / 'pictures/5.png').write_bytes(b'not a picture')
    with (tmp_path / 'pictures/metadata.jsonl').open('w') as file:
        for i in reversed(range(64)):
            file.write(json.dumps(dict(file_name=f'{i}.png', text=held['text'][i])) + '\n')
    (tmp_path / 'tied.txt').write_text('metadata.jsonl has the prompts\n')
    assert '5.png cannot be read: left out' in run('tied')
    own, swapped, tied = (results[name] for name in ('own', 'swapped', 'tied'))
    assert own['rprecision']['value'] > .95
    assert swapped['rprecision']['value'] < .2
    assert own['cmmd']['value'] < .5
    assert own['clip']['value'] > swapped['clip']['value'] + 10
    assert tied['n'] == 63
    assert tied['unreadable'] == 1
    assert tied['rprecision']['value'] > .95

@pytest.fixture(scope='session')
def held(tmp_path_factory):
    """16 held-out pictures of the toy and their captions."""
    rows = datasets.load_dataset(
        'parquet', data_files=str(ROOT / 'assets/toy/data/test.parquet'), split='train')[:16]
    return [image.convert('RGB') for image in rows['image']], rows['text']

def of_images(folder, names, held, prompts=None, save=None, flags=()):
    """evaluate.py --images on held-out pictures by these names: the row and what it said."""
    images, texts = held
    folder.mkdir()
    for i, (name, image) in enumerate(zip(names, images)):
        image.save(folder / name, **(save(i) if save else {}))
    if prompts is not None:
        (folder / 'prompts.txt').write_text('\n'.join(prompts), encoding='utf-8')
        flags = ['--prompts', folder / 'prompts.txt', *flags]
    done = inside(
        ROOT / 'evaluate.py', '--images', '.', '--recipe', 'toy', '--metrics', 'rprecision', *flags,
        '--out', folder / 'x.json', cwd=folder)
    row = {}
    if not done.returncode:
        row, = json.loads((folder / 'x.json').read_text())['rows'].values()
    return row, done

def test_spectrum_and_sharpness_see_lost_texture_and_only_spectrum_sees_noise(held, tmp_path):
    """Real pictures, blurred ones, noisy ones, and those that a VAE has passed against
    themselves."""
    images, texts = held
    vae = m.load_pipeline('assets/toy/sdxl', '--model', torch.float32).vae
    x = torch.stack([pil_to_tensor(image) for image in images]) / 127.5 - 1
    with torch.no_grad():
        passed = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1) / 2 + .5
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) / 5
    made = dict(
        real=images, passed=[to_pil_image(p) for p in passed],
        blurred=[image.filter(ImageFilter.GaussianBlur(1)) for image in images],
        noisy=[to_pil_image(p) for p in ((x / 2 + .5) + noise).clamp(0, 1)])
    names = [f'{i}.png' for i in range(16)]

    def scored(kind, *flags):
        flags = '--metrics', 'sharpness', 'spectrum', *flags
        folder = tmp_path / f'{kind}{len(flags)}'
        row, done = of_images(folder, names, (made[kind], texts), texts, flags=flags)
        assert '| sharpness | spectrum |' in well(done).stdout
        return row['sharpness']['value'], row['spectrum']['value']

    own_sharp, own = scored('real')
    blurred_sharp, blurred = scored('blurred')
    noisy_sharp, noisy = scored('noisy')
    _, lost = scored('passed')
    _, kept = scored('passed', '--real_vae', 'assets/toy/sdxl')
    assert blurred_sharp < .5 * own_sharp < .5 * noisy_sharp
    assert min(blurred, noisy) > 3 * own                        # 16 pictures against 512 others
    assert kept < .5 * lost

TIED = {
    'ComfyUI': (lambda i: f'ComfyUI_{i + 1:05d}_.png', 'by the numbers 1 ... 16 in the names'),
    'A1111': (lambda i: f'{i:05d}-{3000000000 + 7919 * i}.png', 'by the numbers 0 ... 15'),
    'prompt and seed': (lambda i: f'{i:03d}_a_red_ring_seed42.png', 'by the numbers 0 ... 15'),
    'date first': (lambda i: f'im_20240801120000_{i}.PNG', 'by the numbers 0 ... 15 in the names'),
    'letters': (lambda i: f'{"abcdefghijklmnop"[i]}.png', 'by name order')}

@pytest.mark.parametrize('kind', TIED)
def test_pictures_of_other_tools_are_tied_to_their_prompts(kind, held, tmp_path):
    """And the rule is said. Their EXIF orientation holds."""
    name, rule = TIED[kind]
    tags = Image.Exif()
    tags[274] = 6
    images = [image.transpose(Image.ROTATE_90) for image in held[0]]
    row, done = of_images(
        tmp_path / 'a', [name(i) for i in range(16)], (images, held[1]), held[1],
        lambda i: dict(exif=tags))
    assert rule in well(done).stdout
    assert f'{name(0)} ... {name(15)}' in done.stdout
    assert 'to prompts 0 ... 15' in done.stdout
    assert row['rprecision']['value'] > .9

@pytest.mark.parametrize('name', [
    lambda i: f'{i + 3}.png', lambda i: f'{i + (i > 4)}.png', lambda i: f'{i // 2}-{i % 2}.png',
    lambda i: f'{i}-{7 * i % 16}.png', lambda i: f'ComfyUI_{i + 1}.png'],
    ids=['offset', 'gap', 'double', 'seeds', 'from 1, of more prompts'])
def test_pictures_that_cannot_be_tied_are_refused(name, held, tmp_path):
    more = held[1] + (['a red ring on blue'] if '_' in name(0) else [])
    _, done = of_images(tmp_path / 'a', [name(i) for i in range(16)], held, more)
    assert 'which of its 16 pictures belongs to which line' in said_no(done)

def test_blank_lines_count_and_lines_end_at_newlines_alone(held, tmp_path):
    """A picture of the empty prompt is not scored; U+2028 and the like are within a line; a BOM is
    no part of the first."""
    texts = ['\ufeff' + held[1][0].replace(' ', '\u2028', 1), '', *held[1][2:]]
    row, _ = of_images(tmp_path / 'a', [f'{i}.png' for i in range(16)], held, texts)
    assert row['per_picture']['index'] == [0, *range(2, 16)]
    assert row['rprecision']['value'] > .9

def embedded(tool, text):
    """What a tool writes into a PNG beside its picture; also a ComfyUI node without a text."""
    info = PngImagePlugin.PngInfo()
    nodes = {'1': dict(inputs=dict(positive=['2', 0])), '2': dict(inputs=dict(clip_l='a')),
             '3': dict(inputs=dict(seed=1, positive=['7', 0], negative=['8', 0])),
             '7': dict(inputs=dict(conditioning=['6', 0])), '6': dict(inputs=dict(text=text)),
             '8': dict(inputs=dict(text='ugly'))}
    words = f'{text}\nNegative prompt: ugly\nSteps: 20, Seed: 7' if tool == 'parameters' else nodes
    info.add_text(tool, words if isinstance(words, str) else json.dumps(words))
    return dict(pnginfo=info)

@pytest.mark.parametrize('tool', ['parameters', 'prompt'])
@pytest.mark.parametrize('lines', [True, False])
def test_a_prompt_inside_a_picture_ties_it(tool, lines, held, tmp_path):
    """Names tell nothing, or what is wrong; with no prompt file, or one in another order."""
    row, done = of_images(
        tmp_path / 'a', [f'{15 - i}.png' for i in range(16)], held, held[1] if lines else None,
        lambda i: embedded(tool, held[1][i]))
    assert 'by the prompt inside each' in well(done).stdout
    assert ('a line of' in done.stdout) == lines
    assert row['rprecision']['value'] > .9

def test_real_alone_suffices_and_needs_no_captions(held, tmp_path):
    """And each of its pictures counts once, though others were passed over."""
    row, done = of_images(
        tmp_path / 'a', [f'{i}.png' for i in range(16)], held, held[1],
        flags=['--metrics', 'cmmd', '--real', tmp_path / 'a', '--n_real', 16])
    assert f'--real {tmp_path}/a: 16 pictures in the column image' in well(done).stdout
    assert row['cmmd']['value'] < 1e-3
    assert 'judges, of --recipe toy: CLIP score ' in done.stdout
    for i in range(4):
        (tmp_path / f'a/x{i}.png').write_bytes(b'not a picture')
    row, done = of_images(
        tmp_path / 'b', [f'{i}.png' for i in range(16)], held, held[1],
        flags=['--metrics', 'cmmd', '--real', tmp_path / 'a', '--n_real', 20])
    assert '16 pictures used, passed over: 4 broken' in well(done).stdout
    assert row['cmmd']['value'] < 1e-3

# --------------------------------------------------------------------------------------------------
# stage 2

def second(out, *flags, ranks=0, init=STUDENT):
    """A run of stage 2 on the toy; returns its log lines and what it printed."""
    command = ['train_stage2.py', *SMALL, '--eval_every', 0, '--init', init, '--out', out, *flags]
    done = well(start(*command, ranks=ranks) if ranks else inside(*command))
    return rows(out), done

def test_the_first_ratios_are_one(tmp_path):
    """Exactly, as the reference is the student to the bit, so the first loss is log 2; log and
    reward as they should be. And candidates are the sampler's next states: K for a prompt, spread
    by sigma', scored by the latent reward at their own noise level."""
    seen = []
    forward = m.LatentReward.forward

    def overheard(self, z, t, y):
        seen.append((z, t))
        return forward(self, z, t, y)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m.LatentReward, 'forward', overheard)
        lines, done = second(
            tmp_path / 'run', '--no-joint', '--gan', 'none', '--iters', 6, '--batch', 2, '--micro',
            2, '--candidates', 8)
    assert lines[0]['rl/ratio'] == 1
    assert lines[0]['rl/loss'] == float(np.float32(np.log(2)))
    assert lines[1]['rl/ratio'] != 1
    for row in lines:
        assert 'fake' not in row
        assert row['rl/unsound'] == 0
        assert row['rl/gap'] > 0
    schedule = done.page['schedule']
    assert {int(t) for _, ts in seen for t in ts} == {749, 499}
    for z, t in seen:
        assert z.shape == (16, 16, 8, 8)
        assert len(t.unique()) == 1
        spread = z.view(2, 8, -1).var(1).mean().sqrt()
        assert abs(spread / schedule.sigma(t[:1]).item() - 1) < .05

JOINT = ['--iters', 6, '--critic_warmup', 1, '--rl_ratio', 2, '--save_every', 3]

@pytest.fixture(scope='session')
def joint(tmp_path_factory):
    out = tmp_path_factory.mktemp('stage2') / 'run'
    return out, *second(out, *JOINT)

def test_distillation_and_preference_updates_alternate(joint):
    """First fake score and discriminator alone, for they are new; then one distillation, two
    preference updates and again."""
    _, lines, done = joint
    assert ['fake' in row for row in lines] == [True, True, False, False, True, False]
    assert ['grad/dm' in row for row in lines] == [False, True, False, False, True, False]
    assert ['rl/loss' in row for row in lines] == [False, False, True, True, False, True]
    times = {k for row in lines for k in row if k.startswith('reward/')}
    assert times <= {'reward/999', 'reward/749'}
    assert 'of its state: none; new: fake, heads' in done.stdout

def test_stage_2_on_two_ranks_is_one(joint, tmp_path):
    second(tmp_path / 'run', *JOINT, '--micro', 1, ranks=2)
    one, two = weights(joint[0], 6), weights(tmp_path / 'run', 6)
    assert not far_from_one_step(two, one, weights(joint[0], 3))

def test_stage_2_resumes_bit_for_bit(joint, tmp_path):
    """From the save at 3; what the log has beyond it is dropped, evaluations at the save too, for
    they are made again."""
    out = tmp_path / 'run'
    shutil.copytree(joint[0], out, ignore=shutil.ignore_patterns('state-0000006'))
    (out / 'eval.jsonl').write_text('{"iteration": 0}\n{"iteration": 3}\n')
    lines, done = second(out, *JOINT)
    assert 'of iteration 3' in done.stdout
    assert equal(weights(joint[0], 6), weights(out, 6))
    assert [row['iteration'] for row in lines] == [1, 2, 3, 4, 5, 6]
    assert rows(out, 'eval.jsonl') == [dict(iteration=0)]
    # stage 1 has gone on: its student is not this run's reference any more
    later = tmp_path / 'student'
    shutil.copytree(ROOT / STUDENT, later)
    facts = json.loads((later / 'student.json').read_text())
    (later / 'student.json').write_text(json.dumps(facts | dict(iteration=600)))
    done = inside('train_stage2.py', *SMALL, *JOINT, '--iters', 9, '--init', later, '--out', out)
    assert done.returncode == 2
    assert f'error: --init {later} is of iteration 600 now' in done.stderr

ADVERSARIAL = ['--rl', 'grpo', '--reward', 'discriminator', '--candidates', 4, '--iters', 8,
               '--rl_ratio', 2, '--critic_warmup', 1, '--fake_lora', 8, '--save_every', 6,
               '--eval_every', 8, '--eval_n', 4]

@pytest.fixture(scope='session')
def adversarial(tmp_path_factory):
    out = tmp_path_factory.mktemp('advdmd') / 'run'
    return out, *second(out, *ADVERSARIAL)

def test_advdmd_begins_with_distillation(adversarial):
    """Policy updates from a quarter of the run, in the end two for an update by distillation, which
    takes two iterations, --ttur 2: the student learns in every second of them. D sees real and
    generated states in all. After them the evaluation is what it was before."""
    out, lines, _ = adversarial
    before, after = rows(out, 'eval.jsonl')
    assert {*before} == {*after} >= {'reward', 'rprecision', 'cmmd'}
    assert [row['iteration'] for row in lines if 'auc/0' in row] == [6, 8]
    assert [row['iteration'] for row in lines if 'grad/dm' in row] == [2, 4, 7]
    assert all('gan/d' in row and row['dropped'] == 0 for row in lines)
    assert {row.get('rl/ratio', 1) for row in lines} == {1}
    assert max(row.get('rl/advantage', 0) for row in lines) > .1

def test_advdmd_resumes_bit_for_bit(adversarial, tmp_path):
    """D's last logits, by which levels are judged, too."""
    shutil.copytree(adversarial[0], tmp_path / 'run',
                    ignore=shutil.ignore_patterns('state-0000008'))
    _, done = second(tmp_path / 'run', *ADVERSARIAL)
    assert 'of iteration 6' in done.stdout
    one, again = weights(adversarial[0], 8), weights(tmp_path / 'run', 8)
    assert one['logits.weight/real'].isfinite().sum() == 2 * 4 * 4
    assert equal(one, again)

def test_advdmd_on_two_ranks_is_one(adversarial, tmp_path):
    """A group's members are on both: it is the same group."""
    second(tmp_path / 'run', *ADVERSARIAL, '--micro', 1, ranks=2)
    one, two = weights(adversarial[0], 8), weights(tmp_path / 'run', 8)
    assert not far_from_one_step(two, one, weights(adversarial[0], 6))
    for name in ('logits.weight/real', 'logits.weight/made'):
        assert torch.allclose(two[name], one[name], atol=1e-3)

def test_stage_2_goes_on_from_a_run(plain, tmp_path):
    """With its networks, moments and settings, over which the command line goes, but for the weight
    of a GAN of the other kind; at learning rate 0 the student stays what it was, to the bit.
    sample.py finds the result."""
    init, out = tmp_path / 'init', tmp_path / 'run'
    init.mkdir()
    for name in ('student', 'state-0000004'):
        (init / name).symlink_to(plain / name)
    odd = dict(cfg=2.5, gan_weight=.3, couple=.5, grad_checkpointing=True)
    told = json.loads((plain / 'args.json').read_text()) | odd
    (init / 'args.json').write_text(json.dumps(told))
    rates = [x for name in ('student', 'fake', 'heads', 'rl') for x in (f'--{name}_lr', 0)]
    lines, done = second(out, '--iters', 2, '--rl_steps', 'all', '--clamp', .1, '--couple', .75,
                         *rates, init=init)
    assert 'moments of its state: fake, heads, student; new: none' in done.stdout
    assert 'fake' in lines[0]
    assert 'rl/loss' in lines[1]
    before, after = weights(plain, 4), weights(out, 2)
    assert {key.split('/')[0] for key in after.keys() ^ before.keys()} == {
        'rl.step', 'rl.exp_avg', 'rl.exp_avg_sq'}
    for key, value in before.items():
        if key.startswith('student.weight/'):
            assert torch.equal(value, after[key])
    # four steps in stage 1, one here; the preference update has moments of its own
    for name, count in ('student', 5), ('rl', 1):
        assert {v.item() for k, v in after.items() if k.startswith(f'{name}.step/')} == {count}
    handed = ('offload sam data data_files data_limit image_column text_column prompts workers cfg '
              'gan gan_weight gan_crop split ttur batch micro grad_checkpointing '
              'save_dtype').split()
    args = json.loads((out / 'args.json').read_text())
    assert {name: args[name] for name in handed} == {name: told[name] for name in handed}
    assert args['couple'] == .75
    assert '--cfg 2.5' in done.stdout.split('settings handed on:')[1].splitlines()[0]
    for flags, weight in (
            (['--gan', 'pixel'], .3), (['--gan', 'latent'], .005),
            (['--gan', 'latent', '--gan_weight', .2], .2),
            (['--reward', 'discriminator', '--gan', 'latent'], 0)):
        page = refused(TWO, '--init', init, '--clamp', 1, *flags).page
        assert page['args'].gan_weight == weight
    well(inside('sample.py', '--ckpt', out, '--n', 1, '--out', tmp_path / 'x.png'))
    assert Image.open(tmp_path / 'x.png').size[0] > 60

def test_preference_updates_raise_the_reward(tmp_path):
    """And evaluations say so, beside what the reward does not see."""
    second(tmp_path / 'run', '--no-joint', '--gan', 'none', '--batch', 16, '--micro', 16, '--iters',
           16, '--rl_lr', 1e-4, '--eval_every', 16, '--eval_n', 32)
    before, after = rows(tmp_path / 'run', 'eval.jsonl')
    assert after['reward'] > before['reward'] + .1
    assert before.keys() >= {'rprecision', 'cmmd', 'pickscore', 'saturation', 'brightness'}

# --------------------------------------------------------------------------------------------------
# bad input

class Payload:
    """What a pickle would run."""

    def __reduce__(self):
        return print, ('unpickled',)

def altered(source, folder, name, change):
    """A copy of a folder in which one JSON file has been changed."""
    shutil.copytree(source, folder)
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | change))

@pytest.fixture(scope='session')
def broken(tmp_path_factory):
    """A folder of broken things to point flags at."""
    folder = tmp_path_factory.mktemp('broken')
    toy = ROOT / 'assets/toy'
    (folder / 'a_file').write_text('keep me')
    (folder / 'empty.txt').write_text('\n \n')
    (folder / 'binary.txt').write_bytes(b'\xff\xfe\x00\x80' * 10)
    (folder / 'notes').mkdir()
    (folder / 'notes/readme.md').write_text('x')

    torch.save({'image_encoder.pos_embed': torch.zeros(1, 4, 4, 8)}, folder / 'wrong.pth')
    torch.save({'image_encoder.pos_embed': Payload()}, folder / 'pickled.pth')

    shutil.copytree(toy / 'sdxl', folder / 'damaged')
    file = folder / 'damaged/unet/diffusion_pytorch_model.safetensors'
    file.write_bytes(file.read_bytes()[:1000])
    altered(toy / 'sdxl', folder / 'odd', 'scheduler/scheduler_config.json',
            dict(prediction_type='sample'))

    file = 'unet/diffusion_pytorch_model.safetensors'
    tensors = load_file(toy / 'lrm' / file)
    gone = 'mid_block.resnets.0'
    shutil.copytree(toy / 'lrm', folder / 'lrm_lacking')
    save_file({k: v for k, v in tensors.items() if not k.startswith(gone)},
              folder / 'lrm_lacking' / file)
    altered(toy / 'lrm', folder / 'lrm_other', 'unet/config.json', dict(in_channels=4))
    save_file(tensors | {'conv_in.weight': torch.zeros(64, 4, 3, 3)}, folder / 'lrm_other' / file)
    shutil.copytree(toy / 'lrm', folder / 'lrm_pickled')
    torch.save({'logit_scale': Payload()}, folder / 'lrm_pickled/state_dict.pt')

    facts = json.loads((toy / 'student/student.json').read_text())
    for name, change in dict(types=dict(steps=4), lost=dict(base_model='no/where/at/all'),
                             recipe=dict(recipe='cake'), bare=dict(lora=None)).items():
        (folder / f'student_{name}').mkdir()
        (folder / f'student_{name}/student.json').write_text(json.dumps(facts | change))
    for name, content in dict(damaged='{', types='{"batch": [4]}').items():
        (folder / f'init_{name}/student').mkdir(parents=True)
        (folder / f'init_{name}/student/student.json').write_text(json.dumps(facts))
        (folder / f'init_{name}/args.json').write_text(content)
    state = folder / 'stateless/state-0000005'
    state.mkdir(parents=True)
    (state / 'state.json').write_text(json.dumps(dict(iteration=5, files={})))

    for name in ('twice/1.png', 'twice/01.jpg', 'untied/metadata.jsonl', 'unreadable/0.png'):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text('{}')
    (folder / 'several').mkdir()
    (folder / 'several/metadata.jsonl').write_text('{"file_name": "0.png", "text": ["a", "b"]}')
    (folder / 'short.txt').write_text('a red circle on blue\n')
    (folder / 'short.hard.txt').write_text('a\nb\n')
    (folder / 'other.json').write_text('{"settings": {}}')
    return folder

# script, flags, what the sentence says. One row for each sentence; those of adapters and families
# are in test_families.py
ONE, TWO = 'train_stage1.py', 'train_stage2.py'
BAD = [
    (ONE, ['--iter', 3], 'there is no flag --iter; did you mean --iters?'),
    (ONE, ['--gan', 'dino'], '--gan: invalid choice'),
    (ONE, ['--iters', 'many'], '--iters: invalid int'),
    (ONE, ['--student_lr', 'nan'], '--student_lr nan must be at least 0, and finite'),
    (ONE, ['--couple', 2], '--couple 2.0 must be at most 1'),
    (ONE, ['--timeout', 1e9], '--timeout 1000000000.0 must be at most 1000000.0'),
    (ONE, ['--batch', 10, '--micro', 4], '--batch 10 is not a multiple'),
    (ONE, ['--out', 'TMP/a_file/run'], '--out TMP/a_file/run cannot be written'),
    (ONE, ['--out', 'TMP/stateless'], 'state-0000005 is not a state of this script'),
    (ONE, ['--model', 'TMP/nowhere'], '--model TMP/nowhere does not exist'),
    (ONE, ['--model', 'TMP/notes'], '--model TMP/notes is not a diffusers pipeline'),
    (ONE, ['--model', 'TMP/damaged'], '--model TMP/damaged is damaged'),
    (ONE, ['--model', 'TMP/odd'], "--model: its scheduler predicts 'sample'"),
    (ONE, ['--model', 'some-body/no-such-model', '--force'],
     '--model some-body/no-such-model is not on this machine'),
    (ONE, ['--model', 'some-body/no-such-model', '--grad_checkpointing', '--micro', '1', '--batch',
           '1'],
     ': more ranks or --lora 64 or --gan_crop 512 or --offload or --cpu_offload may do;'),
    (ONE, ['--model', 'some-body/no-such-model', '--cpu_offload', '--micro', '1', '--batch', '1',
           '--grad_checkpointing', '--gan', 'none', '--offload'],
     '--cpu_offload takes 82.1 GB of main'),
    (ONE, ['--cpu_offload', '--lora', '4'], '--cpu_offload is for networks trained whole'),
    (ONE, ['--sam', 'TMP/nowhere.pth'], '--sam TMP/nowhere.pth does not exist'),
    (ONE, ['--sam', 'TMP/pickled.pth'], 'pickled code; --sam assets/toy/sam.pth runs offline'),
    (ONE, ['--sam', 'TMP/wrong.pth'], '--sam TMP/wrong.pth is not a segment_anything'),
    (ONE, ['--steps', 1], '--steps 1 gives [999], all on one side'),
    (ONE, ['--gan_crop', 30], '--gan_crop 30 must be a multiple of 8'),
    (ONE, ['--data', 'TMP/nowhere'], '--data TMP/nowhere does not exist'),
    (ONE, ['--data', ''], '--data  does not exist'),
    (ONE, ['--data', 'TMP/a_file'], '--data TMP/a_file holds no .parquet, no'),
    (ONE, ['--data', 'TMP/notes', '--data_files', '*.x'], 'no picture by the name *.x; give a'),
    (ONE, ['--data', 'some-body/no-such-data'], 'some-body/no-such-data is not on this machine'),
    (ONE, ['--text_column', 'caption'], '--text_column caption: --data assets/toy/data has no'),
    (ONE, ['--image_column', 'text'], '--image_column text of --data assets/toy/data does not'),
    (ONE, ['--prompts', 'TMP/binary.txt'], '--prompts TMP/binary.txt cannot be read'),
    (ONE, ['--prompts', 'TMP/empty.txt'], '--prompts TMP/empty.txt has no prompt'),
    (TWO, ['--init', 'TMP/notes'], '--init TMP/notes holds no student'),
    (TWO, ['--init', 'TMP/student_recipe', '--recipe', ''], "its recipe is 'cake'; give --recipe"),
    (TWO, ['--recipe', 'toy-sd3', '--init', ''], '--recipe toy-sd3: the newest student'),
    (TWO, ['--init', 'TMP/student_bare'], '--init TMP/student_bare is damaged, or no student of'),
    (TWO, ['--init', 'TMP/init_damaged'], 'init_damaged/args.json is damaged'),
    (TWO, ['--init', 'TMP/init_types'], "init_types/args.json is damaged"),
    (ONE, ['--dyna', .5], '--dyna 0.5 scales adapters of the fake score; give --fake_lora'),
    (ONE, ['--fake_lora', 4], '--couple 0.97: adapters of --fake_lora are not coupled'),
    (TWO, ['--clamp', 1], '--clamp 1.0 must be below 1'),
    (TWO, ['--rl', 'grpo', '--candidates', 1], '--candidates 1 must be at least 2'),
    (TWO, ['--rl', 'grpo', '--batch', 6], '--batch 6 is not a multiple of --candidates 4'),
    (TWO, ['--rl', 'refl'], '--reward latent has no gradient here'),
    (TWO, ['--reward', 'latent', 'clip'], 'only rewards of pictures can be added up'),
    (TWO, ['--reward', 'clip', '--reward_weight', 1, 2], '--reward_weight [1.0, 2.0]: give one'),
    (TWO, ['--reward', 'discriminator', '--gan', 'pixel'], '--gan pixel trains none on latents'),
    (TWO, ['--reward', 'discriminator', '--gan_weight', .1], 'D learns only the noise levels'),
    (TWO, ['--steps', 1, '--no-split'], 'is one that gets preference updates; use more --steps'),
    (TWO, ['--lrm', 'TMP/nowhere'], '--lrm TMP/nowhere does not exist'),
    # no GAN is left
    (TWO, ['--lrm', 'TMP/nowhere', '--prompts_only', 'assets/prompts.txt'],
     '--lrm TMP/nowhere does not exist'),
    (TWO, ['--prompts_only', 'assets/prompts.txt', '--reward', 'discriminator'], 'none, or --data'),
    (TWO, ['--lrm', ''], '--lrm  does not exist'),
    (TWO, ['--goal', 'nan'], '--goal nan must be at least -1'),
    (TWO, ['--lrm', 'TMP/lrm_pickled'], '--lrm TMP/lrm_pickled could not be loaded'),
    (TWO, ['--lrm', 'TMP/lrm_lacking'], '--lrm TMP/lrm_lacking: its unet lacks mid_block'),
    (TWO, ['--lrm', 'TMP/lrm_other'], '--lrm TMP/lrm_other: its unet reads 4 latent channels'),
    (TWO, ['--rl_prompts', 'TMP/nowhere.txt'], '--rl_prompts TMP/nowhere.txt cannot be read'),
    ('sample.py', ['--steps', 1001], '--steps 1001'),
    ('sample.py', ['--out', 'TMP/notes'], '--out TMP/notes is a folder'),
    ('sample.py', ['--merge', 'TMP/new', '--teacher'], '--merge is for a student'),
    ('sample.py', ['--push_to_hub', 'a/b', '--merge', 'TMP/a.safetensors'], 'uploads a folder'),
    ('sample.py', ['--out', 'TMP/notes/'], '--out TMP/notes/ has files in it'),
    ('sample.py', ['--ckpt', 'TMP/student_types'], '--ckpt TMP/student_types is damaged'),
    ('sample.py', ['--teacher', '--ckpt', 'TMP/student_lost'], '--teacher: the student'),
    ('evaluate.py', ['--n', 100000], '--n 100000'),
    ('evaluate.py', ['--steps', 1001], '--steps 1001 must be at most 1000'),
    ('evaluate.py', ['--sheet', 'mps'], '--sheet mps is not among --metrics'),
    ('evaluate.py', ['--clip', 'TMP/notes', '--metrics', 'clip'], 'TMP/notes could not be'),
    ('evaluate.py', ['--images', 'TMP/notes'], '--images TMP/notes has no picture'),
    ('evaluate.py', ['--images', 'TMP/twice'], '--images TMP/twice: which of its 2 pictures'),
    ('evaluate.py', ['--images', 'TMP/untied'], '--images: TMP/untied/metadata.jsonl must'),
    ('evaluate.py', ['--images', 'TMP/several'], 'it is empty, or a text is no string'),
    ('evaluate.py', ['--images', 'TMP/unreadable'], 'none of its 1 pictures can be read'),
    ('evaluate.py', ['--pipeline', 'TMP/gone.safetensors'], 'TMP/gone.safetensors does not exist'),
    ('evaluate.py', ['--prompts', 'TMP/short.txt'], 'TMP/short.hard.txt has 2 lines'),
    ('evaluate.py', ['--out', 'TMP/other.json'], '--out TMP/other.json holds something else'),
    ('evaluate.py', ['--ckpt', 'TMP/student_recipe'], "its recipe is 'cake'; give --recipe"),
    ('tests/make_toy.py', ['--only', 'everything'], '--only: invalid choice'),
    ('tests/make_toy.py', ['--device', 'abacus'], '--device abacus'),
    ('tests/make_toy.py', ['--work', 'TMP/a_file'], '--work TMP/a_file cannot be written'),
]

def said_no(done):
    """The one line of a refusal, argparse's usage and progress bars aside."""
    lines = [x for x in done.stderr.splitlines() if x and x[:6] != 'usage:' and '%|' not in x]
    assert done.returncode == 2, done.stdout[-1000:] + done.stderr[-2000:]
    assert len(lines) == 1 and 'error: ' in lines[0], done.stderr[-2000:]
    assert 'unpickled' not in done.stdout
    return lines[0]

@pytest.mark.parametrize(
    'script, flags, says', BAD, ids=[f'{s[:-3]} {" ".join(map(str, f))}' for s, f, _ in BAD])
def test_bad_input_is_one_sentence(script, flags, says, broken, tmp_path):
    """Exit code 2, one line that names the flag; nothing is written, what was there stays."""
    stage = script in (ONE, TWO)
    own = {
        ONE: {'--recipe': 'toy', '--iters': 1},
        TWO: {'--recipe': 'toy', '--iters': 1, '--init': STUDENT, '--eval_every': 0},
        'sample.py': {'--ckpt': STUDENT}, 'evaluate.py': {'--ckpt': STUDENT},
        'tests/make_toy.py': {'--only': 'data', '--work': tmp_path / 'work'}}[script]
    own['--out'] = tmp_path / ('run' if stage else 'x.png')
    rest = [x for name, value in own.items() if name not in flags for x in (name, value)]
    before = stamps(broken, ROOT / 'assets')
    line = said_no(refused(script, *[str(f).replace('TMP', str(broken)) for f in flags], *rest))
    assert says.replace('TMP', str(broken)) in line
    assert stamps(broken, ROOT / 'assets') == before
    assert listing(tmp_path).keys() <= {'run/.lock'}

def test_every_sentence_has_a_row_of_its_own():
    assert max(Counter(says for _, _, says in BAD).values()) <= 2

def test_another_runs_folder_is_not_overwritten(plain):
    """Of another model, or of the other stage."""
    before = stamps(plain)
    for command, says in (
            ([*TRAIN, '--model', 'assets/toy/sd3'], 'holds a run of --model assets/toy/sdxl, not'),
            ([TWO, '--init', STUDENT], 'holds a run of the other stage')):
        line = said_no(refused(*command, '--out', plain))
        assert f'--out {plain} {says}' in line
        assert 'choose another --out' in line
    assert stamps(plain) == before

def test_more_ranks_than_gpus(monkeypatch, capsys):
    """Two ranks on a machine with one GPU: both stop, and the first says so."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    for rank in ('0', '1'):
        for name, value in dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE='2',
                                LOCAL_WORLD_SIZE='2').items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as stop:
            m.launch(1)
        said = capsys.readouterr().err
        assert stop.value.code == 2
        assert ('--nproc_per_node: 2 ranks' in said) == (rank == '0')
        assert said.count('\n') == (rank == '0')

@pytest.mark.parametrize('script', [*SCRIPTS[1:3], *SCRIPTS[4:6], 'tests/make_toy.py',
                                    'tests/bench.py'])
def test_help(script):
    """With the default of each recipe; and a flag that is none is told what was meant."""
    done = well(inside(script, '--help'))
    said = ' '.join(done.stdout.split())
    assert not done.stderr
    if script in (ONE, TWO):
        assert 'optimisation:' in said and 'method:' in said
        assert re.search(r'weight of the student.s adversarial loss \[sdxl, sd3.*: 0.01; toy', said)
        assert '[attention]' in said
        for wrong, says in (
                ('--bach=3', 'there is no flag --bach; did you mean --batch?'),
                ('--max_train_steps', 'there is no flag --max_train_steps; here that is --iters'),
                ('--resume', 'here that is none: the same command again resumes'),
                ('--lr', 'there is no flag --lr; here that is --student_lr'),
                ('--zzz', 'there is no flag --zzz; see --help')):
            assert says in said_no(refused(script, wrong, '--recipe', 'toy'))

def test_what_a_run_says_first(plain):
    """The recipe, then the plan, the data and the networks; the time left in each line."""
    said = plain.with_name('said').read_text()
    lines = said.splitlines()
    for line, begin in zip(lines, ('recipe toy: ', 'plan: ', '--data ', 'networks: 4.')):
        assert line.startswith(begin)
    assert re.search(r"the teacher's pictures: 50 steps, [\d.]+ s", said)
    assert re.search(r'    1/4 .* s/it, \d+ s left', said)

def test_from_any_folder(tmp_path):
    """Nothing is known of where the page was started: the same commands go on from the root."""
    well(inside(ROOT / ONE, *TRAIN[1:], '--iters', 1, '--gan', 'none', '--out', tmp_path / 'run',
                cwd=tmp_path))
    args = json.loads((tmp_path / 'run/args.json').read_text())
    facts = json.loads((tmp_path / 'run/student/student.json').read_text())
    assert args['model'] == facts['base_model'] == 'assets/toy/sdxl'
    done = well(inside(*TRAIN, '--iters', 2, '--gan', 'none', '--out', tmp_path / 'run'))
    assert '--model is' not in done.stdout and 'of iteration 1' in done.stdout
    done = well(inside(
        ROOT / TWO, *SMALL, '--eval_every', 0, '--iters', 1, '--critic_warmup', 1,
        '--save_every', 1, '--out', 'two', cwd=tmp_path))
    assert 'the student is unchanged: all 1 iterations' in done.stdout
    facts = json.loads((tmp_path / 'two/student/student.json').read_text())
    assert facts['base_model'] == 'assets/toy/sdxl'
    well(inside(ROOT / 'sample.py', '--ckpt', 'two', '--n', 1, cwd=tmp_path))

def test_all_that_is_missing_at_once(monkeypatch):
    """What is on the hub and not here, with licences to accept, and a library; before any of it."""
    answers = {'a/gated': GatedRepoError, 'b/none': RepositoryNotFoundError, 'c/lost': OSError}

    def auth_check(self, name, repo_type):
        if name in answers:
            raise answers[name]('no', **{} if name == 'c/lost' else dict(response=Response()))

    class Response:
        headers, request = {}, None

    monkeypatch.setattr(huggingface_hub.HfApi, 'auth_check', auth_check)
    monkeypatch.setitem(sys.modules, 'wandb', None)
    line = said_no(refused(
        ONE, '--recipe', 'toy', '--model', 'a/gated', '--data', 'b/none', '--wandb', 'x',
        '--lora', 8, '--force'))
    for says in ('--wandb needs wandb: pip install wandb',
                 '--model a/gated: accept its licence at https://huggingface.co/a/gated, then `hf '
                 'auth login`',
                 '--data b/none: there is no https://huggingface.co/datasets/b/none'):
        assert says in line
    line = said_no(refused(TWO, '--recipe', 'toy', '--init', STUDENT, '--lrm', 'c/lost/lrm_sdxl'))
    assert '--lrm c/lost is not on this machine, and https://huggingface.co/c/lost cannot' in line

def test_a_true_start_refuses_as_well():
    """What `refused` stands for, once: a process of its own."""
    line = said_no(start(ONE, '--batch', 0))
    assert '--batch 0 must be at least 1' in line
