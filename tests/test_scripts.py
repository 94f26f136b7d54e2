"""
The real scripts as subprocesses, on the CPU: ranks, micro-batches, resume, export, tables, bad input.
pytest tests/test_scripts.py
"""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from conftest import ENV, ROOT, start

TRAIN = ['train_stage1.py', '--recipe', 'toy', '--sample_every', 0, '--log_every', 5]


def weights(out, it):
    """Every network's weights and every optimiser's moments of a run's state, one dict."""
    return {f'{f.name}:{k}': v for f in sorted((out / f'state-{it:07d}').glob('*.safetensors'))
            for k, v in load_file(f).items()}


def largest_difference(a, b, kind=''):
    assert a.keys() == b.keys() and a
    return max((a[k].float() - b[k].float()).abs().max().item() for k in a if kind in k)


def train(out, *flags, ranks=0):
    done = start(*TRAIN, '--out', out, *flags, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope='session')
def plain(tmp_path_factory):
    """The uninterrupted single-process run of 20 iterations that the others are compared with."""
    out = tmp_path_factory.mktemp('runs') / 'plain'
    train(out, '--iters', 20, '--save_every', 10, '--sample_every', 20)
    return out


# ------------------------------------------------------------------------------------------- the same result, any way

def test_two_ranks_are_one(plain, tmp_path):
    train(tmp_path / 'run', '--iters', 20, '--micro', 8, ranks=2)
    a, b = weights(plain, 20), weights(tmp_path / 'run', 20)
    assert largest_difference(a, b, 'student.safetensors') < 1e-4
    assert largest_difference(a, b, 'fake.safetensors') < 1e-4
    assert largest_difference(a, b, 'heads.safetensors') < 1e-4


def test_micro_batch_does_not_matter(plain, tmp_path):
    train(tmp_path / 'run', '--iters', 20, '--micro', 4)
    a, b = weights(plain, 20), weights(tmp_path / 'run', 20)
    assert all(largest_difference(a, b, f'{k}.safetensors') < 1e-4 for k in ('student', 'fake', 'heads'))


def test_resumed_is_uninterrupted_bit_for_bit(plain, tmp_path):
    """Stopped by SIGKILL somewhere after the save at 10, then the same command again."""
    command = [sys.executable, *map(str, TRAIN), '--out', str(tmp_path / 'run'), '--iters', '20', '--save_every', '10']
    process = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.time() + 300
    while not (tmp_path / 'run/student/student.json').exists() and time.time() < until:
        time.sleep(.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / 'run/state-0000020').exists()
    (tmp_path / 'run/state-0000015.tmp').mkdir()                                      # a save that the kill cut short
    done = train(tmp_path / 'run', '--iters', 20, '--save_every', 10)
    assert 'from iteration 10' in done.stdout
    assert largest_difference(weights(plain, 20), weights(tmp_path / 'run', 20)) == 0
    lines = [json.loads(x)['iteration'] for x in (tmp_path / 'run/log.jsonl').read_text().splitlines()]
    assert lines == [5, 10, 15, 20]


def test_what_a_run_leaves_behind(plain):
    names = {f.name for f in plain.iterdir()}
    assert {'args.json', 'log.jsonl', 'curves.png', 'samples-0000000.png', 'samples-0000020.png', 'state-0000020', 'student'} <= names
    rows = [json.loads(x) for x in (plain / 'log.jsonl').read_text().splitlines()]
    for key in ('fake', 'gan/d', 'gan/g', 'gan/real', 'gan/made', 'grad/dm', 'grad/gan', 'norm/student', 'seconds', 'memory', 'dropped', 'skipped'):
        assert all(np.isfinite(row[key]) for row in rows), key
    assert {k for row in rows for k in row if k.startswith('dm/')} <= {'dm/999', 'dm/749', 'dm/499'}
    again = train(plain, '--iters', 20, '--save_every', 10)                           # a finished run: nothing to do, no error
    assert 'from iteration 20' in again.stdout


@pytest.mark.parametrize('flags', [
    ['--gan', 'latent', '--no-split', '--ttur', 2, '--couple', 1], ['--gan', 'none'], ['--gan', 'latent'], ['--no-split'],
    ['--checkpointing', '--gan_crop', 32, '--save_dtype', 'float32', '--workers', 0]])
def test_ablations_run(flags, tmp_path):
    train(tmp_path / 'run', '--iters', 4, '--log_every', 1, *flags)
    rows = [json.loads(x) for x in (tmp_path / 'run/log.jsonl').read_text().splitlines()]
    assert len(rows) == 4 and all(row['dropped'] == 0 for row in rows)
    assert ('gan/d' in rows[0]) == ('none' not in flags)
    if '--ttur' in flags:
        assert ['grad/dm' in row for row in rows] == [True, False, True, False]


def test_latent_gan_is_the_same_on_two_ranks(tmp_path):
    """Here the discriminator's gradient enters the fake score past its DDP wrapper: it must be averaged all the same."""
    flags = ['--gan', 'latent', '--no-split', '--ttur', 2, '--couple', 1, '--iters', 6, '--micro', 8]
    train(tmp_path / 'a', *flags)
    train(tmp_path / 'b', *flags, ranks=2)
    a, b = weights(tmp_path / 'a', 6), weights(tmp_path / 'b', 6)
    assert all(largest_difference(a, b, f'{k}.safetensors') < 1e-5 for k in ('student', 'fake', 'heads'))


# --------------------------------------------------------------------------------------------------- sample, evaluate

@pytest.mark.parametrize('steps, said', [(1, 'a subset of'), (2, 'a subset of'), (4, 'its own steps'), (8, 'a finer grid')])
def test_sample_any_number_of_steps(steps, said, tmp_path):
    done = start('sample.py', '--ckpt', 'assets/toy/student', '--steps', steps, '--n', 3, '--batch', 2, '--out', tmp_path / 's.png')
    assert done.returncode == 0, done.stderr[-2000:]
    assert said in done.stdout and 's per picture in the first call' in done.stdout
    assert Image.open(tmp_path / 's.png').size[0] > 300


def test_sample_teacher_prompt_and_prompts_file(tmp_path):
    (tmp_path / 'p.txt').write_text('a red circle on blue\n\na green ring on black\n')
    for flags in (['--teacher', '--steps', 3, '--cfg', 2], ['--prompts', tmp_path / 'p.txt'], ['--prompt', 'a red star on white']):
        done = start('sample.py', '--ckpt', 'assets/toy/student', *flags, '--n', 2, '--out', tmp_path / 's.png')
        assert done.returncode == 0, done.stderr[-2000:]


def test_sample_finds_the_newest_run(plain, tmp_path):
    for name in ('model.py', 'sample.py', 'assets'):
        (tmp_path / name).symlink_to(ROOT / name)
    assert 'assets/toy/student' in start('sample.py', '--n', 1, cwd=tmp_path).stdout
    shutil.copytree(plain / 'student', tmp_path / 'out/stage1/student')
    assert 'out/stage1/student' in start('sample.py', '--n', 1, cwd=tmp_path).stdout
    assert (tmp_path / 'samples.png').exists()


def test_sample_is_plain_diffusers(tmp_path):
    """sample.py's grid holds the pictures that diffusers alone makes from the saved folder with the same generators."""
    from diffusers import DiffusionPipeline
    import model as m
    done = start('sample.py', '--ckpt', 'assets/toy/student', '--prompt', 'a red star on white', '--n', 2, '--out', tmp_path / 's.png')
    assert done.returncode == 0, done.stderr[-2000:]
    pipe = DiffusionPipeline.from_pretrained(ROOT / 'assets/toy/student', dtype=torch.float32)
    images = pipe(['a red star on white'] * 2, num_inference_steps=4, guidance_scale=0., output_type='pt',
                  generator=[m.generator(0, i) for i in range(2)]).images
    m.picture_grid([images * 2 - 1], ['a red star on white'] * 2, tmp_path / 'ours.png')
    a, b = (np.asarray(Image.open(tmp_path / f).convert('RGB')).astype(int) for f in ('s.png', 'ours.png'))
    assert np.abs(a - b).max() <= 1


def table(*flags, ranks=0, out=None):
    done = start('evaluate.py', '--ckpt', 'assets/toy/student', '--n', 12, '--n_real', 64, '--out', out, *flags, ranks=ranks)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(out.read_text())['rows']
    assert '| R-precision |' in done.stdout
    return rows


def test_evaluate_does_not_depend_on_batch_or_ranks(tmp_path):
    one = table('--teacher', '--teacher_steps', 3, '--batch', 5, out=tmp_path / 'a.json')
    two = table('--teacher', '--teacher_steps', 3, '--batch', 16, ranks=2, out=tmp_path / 'b.json')
    assert len(one) == 2 and one.keys() == two.keys()
    for label in one:
        assert one[label]['r_precision'] == two[label]['r_precision']
        assert abs(one[label]['clip_score'] - two[label]['clip_score']) < 1e-2
        assert abs(one[label]['cmmd'] - two[label]['cmmd']) < 1e-3


def test_real_pictures_score_as_real(tmp_path):
    """Held-out pictures beside their own captions: near-perfect R-precision, CMMD near nothing. Swapped captions: not."""
    import datasets
    rows = datasets.load_dataset('parquet', data_files=str(ROOT / 'assets/toy/data/test.parquet'), split='train')[:64]
    (tmp_path / 'pictures').mkdir()
    for i, image in enumerate(rows['image']):
        image.save(tmp_path / f'pictures/{i:03d}.png')
    scores = {}
    for name, captions in (('own', rows['text']), ('swapped', rows['text'][1:] + rows['text'][:1])):
        (tmp_path / f'{name}.txt').write_text('\n'.join(captions))
        done = start('evaluate.py', '--images', tmp_path / 'pictures', '--recipe', 'toy', '--prompts', tmp_path / f'{name}.txt',
                     '--out', tmp_path / f'{name}.json')
        assert done.returncode == 0, done.stderr[-2000:]
        scores[name], = json.loads((tmp_path / f'{name}.json').read_text())['rows'].values()
    assert scores['own']['r_precision'] > .95 and scores['swapped']['r_precision'] < .2
    assert scores['own']['cmmd'] < .5 and scores['own']['clip_score'] > scores['swapped']['clip_score'] + 10


# ---------------------------------------------------------------------------------------------------------- bad input

class Payload:
    def __reduce__(self):
        return print, ('unpickled',)


def prepare(folder):
    """Broken things to point flags at."""
    (folder / 'empty.txt').write_text('\n \n')
    (folder / 'binary.txt').write_bytes(b'\xff\xfe\x00\x80' * 10)
    (folder / 'notes').mkdir()
    (folder / 'notes/readme.md').write_text('x')
    torch.save({'image_encoder.pos_embed': torch.zeros(1, 4, 4, 8)}, folder / 'wrong.pth')
    torch.save({'image_encoder.pos_embed': Payload()}, folder / 'pickled.pth')
    whole = (ROOT / 'assets/toy/sam.pth').read_bytes()
    (folder / 'short.pth').write_bytes(whole[:len(whole) // 2])
    shutil.copytree(ROOT / 'assets/toy/sdxl', folder / 'damaged')
    file = folder / 'damaged/unet/diffusion_pytorch_model.safetensors'
    file.write_bytes(file.read_bytes()[:1000])
    shutil.copytree(ROOT / 'assets/toy/student', folder / 'student')
    (folder / 'student/student.json').write_text('{')
    (folder / 'a_file').write_text('keep me')
    (folder / 'other.json').write_text('{"settings": {}}')


BAD = [
    ('train_stage1.py', ['--iterz', 3], 'unrecognized'),
    ('train_stage1.py', ['--iter', 3], 'unrecognized'),
    ('train_stage1.py', ['--gan', 'dino'], 'invalid choice'),
    ('train_stage1.py', ['--batch', 10, '--micro', 4], '--batch 10'),
    ('train_stage1.py', ['--batch', 0], '--batch 0'),
    ('train_stage1.py', ['--steps', 0], '--steps 0'),
    ('train_stage1.py', ['--steps', 1], '--steps 1'),
    ('train_stage1.py', ['--gan_crop', 30], '--gan_crop 30'),
    ('train_stage1.py', ['--couple', 2], '--couple'),
    ('train_stage1.py', ['--model', 'TMP/nowhere'], '--model'),
    ('train_stage1.py', ['--model', 'TMP/notes'], '--model'),
    ('train_stage1.py', ['--model', 'TMP/damaged'], '--model'),
    ('train_stage1.py', ['--model', 'some-body/no-such-model'], '--model assets/toy/sdxl'),
    ('train_stage1.py', ['--sam', 'TMP/nowhere.pth'], '--sam'),
    ('train_stage1.py', ['--sam', 'TMP/wrong.pth'], '--sam'),
    ('train_stage1.py', ['--sam', 'TMP/short.pth'], '--sam'),
    ('train_stage1.py', ['--sam', 'TMP/pickled.pth'], 'pickled'),
    ('train_stage1.py', ['--sam', 'vit_b'], '--sam assets/toy/sam.pth'),
    ('train_stage1.py', ['--data', 'TMP/nowhere'], '--data'),
    ('train_stage1.py', ['--data', 'TMP/notes', '--data_files', ''], '--data'),
    ('train_stage1.py', ['--data', 'TMP/a_file'], '--data'),
    ('train_stage1.py', ['--data', 'some-body/no-such-data'], '--data assets/toy/data'),
    ('train_stage1.py', ['--text_column', 'caption'], '--text_column caption'),
    ('train_stage1.py', ['--image_column', 'text'], '--image_column text'),
    ('train_stage1.py', ['--prompts', 'TMP/empty.txt'], '--prompts'),
    ('train_stage1.py', ['--out', 'TMP/a_file'], '--out'),
    ('sample.py', ['--steps', 0], '--steps 0'),
    ('sample.py', ['--step', 4], 'unrecognized'),
    ('sample.py', ['--ckpt', 'TMP/nowhere'], '--ckpt'),
    ('sample.py', ['--ckpt', 'TMP/notes'], '--ckpt'),
    ('sample.py', ['--ckpt', 'TMP/student'], '--ckpt'),
    ('sample.py', ['--prompts', 'TMP/empty.txt'], '--prompts'),
    ('sample.py', ['--prompts', 'TMP/binary.txt'], '--prompts'),
    ('sample.py', ['--prompts', 'TMP/nowhere.txt'], '--prompts'),
    ('sample.py', ['--out', 'TMP/a_file/x.png'], '--out'),
    ('sample.py', ['--n', 0], '--n 0'),
    ('evaluate.py', ['--n', 100000], '--n 100000'),
    ('evaluate.py', ['--clip', 'TMP/notes'], '--clip'),
    ('evaluate.py', ['--images', 'TMP/notes'], '--images'),
    ('evaluate.py', ['--out', 'TMP/other.json'], '--out'),
    ('evaluate.py', ['--real', 'TMP/nowhere'], '--real'),
]


def listing(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob('*')) if f.is_file()}


@pytest.fixture(scope='session')
def broken(tmp_path_factory):
    folder = tmp_path_factory.mktemp('broken')
    prepare(folder)
    return folder, listing(folder)


@pytest.mark.parametrize('script, flags, names', BAD, ids=[f'{s[:-3]} {" ".join(map(str, f))}' for s, f, _ in BAD])
def test_bad_input_is_one_sentence(script, flags, names, broken, tmp_path):
    folder, before = broken
    flags = [str(f).replace('TMP', str(folder)) for f in flags]
    extra = [] if '--out' in flags else ['--out', tmp_path / ('run' if script.startswith('train') else 'x.png')]
    extra += ['--recipe', 'toy', '--iters', 1] if script.startswith('train') else []
    extra += ['--ckpt', 'assets/toy/student'] if script in ('sample.py', 'evaluate.py') and '--ckpt' not in flags else []
    done = start(script, *flags, *extra, timeout=120)
    lines = [x for x in done.stderr.splitlines() if x and not x.startswith('usage:')]
    assert done.returncode == 2, done.stderr[-2000:]
    assert len(lines) == 1 and 'error: ' in lines[0] and names in lines[0], done.stderr[-2000:]
    assert 'Traceback' not in done.stderr and 'unpickled' not in done.stdout
    assert listing(folder) == before
    assert not list((tmp_path / 'run').glob('state-*'))


def test_a_run_of_another_model_is_not_overwritten(plain, tmp_path):
    shutil.copytree(plain, tmp_path / 'run')
    shutil.copytree(ROOT / 'assets/toy/sdxl', tmp_path / 'other')
    before = listing(tmp_path / 'run')
    done = start(*TRAIN, '--out', tmp_path / 'run', '--model', tmp_path / 'other', '--iters', 20)
    assert done.returncode == 2 and 'choose another --out' in done.stderr and listing(tmp_path / 'run') == before


@pytest.mark.parametrize('script', ['train_stage1.py', 'sample.py', 'evaluate.py', 'tests/make_toy.py', 'tests/bench.py'])
def test_help(script):
    done = start(script, '--help')
    assert done.returncode == 0 and '--' in done.stdout


def test_the_default_recipe_is_the_toy_without_a_gpu(tmp_path):
    done = start('train_stage1.py', '--iters', 1, '--gan', 'none', '--sample_every', 0, '--out', tmp_path / 'run')
    assert done.returncode == 0 and 'recipe toy: assets/toy/sdxl' in done.stdout
