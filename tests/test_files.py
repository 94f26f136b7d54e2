"""
Data, saved states, the exported student and the toy world's files.

    pytest tests/test_files.py
"""

import argparse
import ast
import contextlib
import inspect
import io
import itertools
import json
import os
import pickle
import re
import shutil
import tarfile
import threading
from collections import Counter

import datasets
import diffusers
import numpy as np
import pytest
import torch
import torch.nn as nn
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from PIL import Image
from safetensors.torch import load_file, save_file

import make_toy
import model as m
from conftest import ROOT, equal, inside, weights

TOY = ROOT / 'assets/toy'

# --------------------------------------------------------------------------------------------------
# data

def png(size=(80, 64), colour='red'):
    buffer = io.BytesIO()
    Image.new('RGB', size, colour).save(buffer, 'PNG')
    return buffer.getvalue()

def folder_of_pictures(folder, n=6):
    folder.mkdir()
    lines = []
    for i in range(n):
        (folder / f'{i}.png').write_bytes(png(colour=(20 * i, 0, 0)))
        lines.append(json.dumps(dict(file_name=f'{i}.png', text=f'picture {i}')))
    (folder / 'metadata.jsonl').write_text('\n'.join(lines))
    return folder

def tar_of_pictures(file, names):
    """A webdataset: for each name a picture, and a JSON file with its caption."""
    with tarfile.open(file, 'w') as tar:
        for i, name in enumerate(names):
            words = json.dumps(dict(prompt=f'tar {i}')).encode()
            for suffix, data in (('jpg', png()), ('json', words)):
                info = tarfile.TarInfo(f'{name}{i}.{suffix}')
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return m.Pictures(str(file), '', 'jpg', 'json.prompt', 64, 0)

def data(folder):
    return m.Pictures(str(folder), '', 'image', 'text', 64, 0)

def test_every_kind_of_source(tmp_path):
    """imagefolder, parquet, webdataset tar with a nested caption column: same interface."""
    sample = data(folder_of_pictures(tmp_path / 'a'))[0]
    assert sample['pixels'].shape == (3, 64, 64)
    assert sample['text'].startswith('picture')
    assert not sample['trouble']
    assert -1 <= sample['pixels'].min() and sample['pixels'].max() <= 1
    assert data(TOY / 'data/train.parquet')[0]['text'].startswith('a ')
    assert tar_of_pictures(tmp_path / 'shard.tar', ['', '', ''])[0]['text'].startswith('tar')

def test_an_archive_writes_nothing_outside(tmp_path):
    """Names with ../ and absolute ones in a webdataset tar: its pictures are rows like others, no
    file of it is unpacked."""
    (tmp_path / 'a/b').mkdir(parents=True)
    pictures = tar_of_pictures(
        tmp_path / 'a/b/shard.tar', ['../up', '../../up', f'{tmp_path}/absolute', 'x/../../up'])
    assert {pictures[i]['text'] for i in range(4)} == {f'tar {i}' for i in range(4)}
    assert [f.name for f in tmp_path.rglob('*') if f.is_file()] == ['shard.tar']
    for place in (ROOT, ROOT.parent, tmp_path.parent):
        assert not list(place.glob('up*'))

def test_what_cannot_be_used_is_passed_over_and_counted_by_reason(tmp_path):
    """The next one of the stream is taken."""
    folder = folder_of_pictures(tmp_path / 'a', 8)
    (folder / '1.png').write_bytes(png()[:60])
    (folder / '2.png').write_bytes(png((20, 20)))
    (folder / '3.png').write_bytes(b'not a picture')
    (folder / '6.png').unlink()
    lines = (folder / 'metadata.jsonl').read_text()
    lines = lines.replace('"picture 4"', 'null').replace('"picture 7"', '" "')
    (folder / 'metadata.jsonl').write_text(lines)
    pictures = data(folder)
    samples = [pictures[i] for i in range(8)]
    assert {s['text'] for s in samples} == {'picture 0', 'picture 5'}
    why = {1: 'broken', 2: 'small', 3: 'broken', 4: 'uncaptioned', 6: 'missing', 7: 'uncaptioned'}
    order = [pictures._place(i) for i in range(16)]
    for i, sample in enumerate(samples):
        passed = itertools.takewhile(lambda k: k in why, order[i:])
        assert sample['trouble'] == Counter(why[k] for k in passed)
    # the prompts of the preference updates: the same rule, but no picture is looked at
    spoken = [next(k for k in order[i:] if k not in (4, 7)) for i in range(8)]
    assert pictures.captions(range(8)) == [f'picture {k}' for k in spoken]

# --------------------------------------------------------------------------------------------------
# pictures and sets as people have them

def scene(size=96):
    """Red, green; blue, white."""
    a = np.zeros((size, size, 3), np.uint8)
    half = size // 2
    a[:half, :half, 0] = a[:half, half:, 1] = a[half:, :half, 2] = a[half:, half:] = 255
    return Image.fromarray(a)

def saved(image, kind, **how):
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()

def exif(orientation):
    tags = Image.Exif()
    tags[274] = orientation
    return tags

def disc():
    """A picture of mode RGBA, opaque red in the middle of transparent noise; and what it shows."""
    y, x = np.mgrid[:96, :96]
    inside = (y - 48) ** 2 + (x - 48) ** 2 < 900
    a = np.random.default_rng(0).integers(0, 255, (96, 96, 4), np.uint8)
    a[..., 3] = 255 * inside
    a[inside, :3] = 255, 0, 0
    shown = np.full((96, 96, 3), 255)
    shown[inside] = 255, 0, 0
    return Image.fromarray(a), shown

def pictures_as_people_have_them():
    """{kind: (its bytes, the pixels that a viewer shows)}."""
    rgb, grey = scene(), scene().convert('L')
    x, y = np.array(rgb), np.array(grey)
    black = [Image.new('RGB', (96, 96))]
    turned = [Image.FLIP_LEFT_RIGHT, Image.ROTATE_180, Image.FLIP_TOP_BOTTOM, Image.TRANSPOSE,
              Image.ROTATE_90, Image.TRANSVERSE, Image.ROTATE_270]
    found = {f'EXIF {k}': (saved(rgb.transpose(how), 'PNG', exif=exif(k)), x)
             for k, how in enumerate(turned, 2)}
    found['EXIF of JPEG'] = saved(rgb.transpose(Image.ROTATE_90), 'JPEG', exif=exif(6)), x
    rgba, shown = disc()
    palette = Image.fromarray(1 * (shown[..., 1] == 0).astype(np.uint8), 'P')
    palette.putpalette([255, 0, 255, 255, 0, 0])
    found |= {
        'alpha': (saved(rgba, 'PNG'), shown), 'alpha of WebP': (
            saved(rgba, 'WEBP', lossless=True), shown),
        'transparent entry': (saved(palette, 'PNG', transparency=0), shown),
        'palette': (saved(rgb.convert('P', palette=Image.ADAPTIVE), 'PNG'), x),
        'CMYK': (saved(rgb.convert('CMYK'), 'JPEG', quality=95), x),
        'grey': (saved(grey, 'PNG'), y[..., None] + 0 * x),
        'float': (saved(Image.fromarray(y.astype(np.float32) / 255), 'TIFF'), y[..., None] + 0 * x),
        'first frame': (saved(rgb, 'GIF', save_all=True, append_images=black), x)}
    for kind in ('PNG', 'TIFF'):
        wide = Image.fromarray(y.astype(np.uint16) * 257)
        found[f'16 bits of {kind}'] = saved(wide, kind), y[..., None] + 0 * x
    return found

@pytest.mark.parametrize('kind', pictures_as_people_have_them())
def test_a_picture_is_what_a_viewer_shows(kind, tmp_path):
    """By the one function that opens pictures: in training..."""
    data, shown = pictures_as_people_have_them()[kind]
    opened = np.asarray(m.open_picture(data)).astype(int)
    assert opened.shape == shown.shape
    assert np.abs(opened - shown).mean() < 3
    datasets.Dataset.from_dict(dict(image=[data], text=['x'])).to_parquet(tmp_path / 'a.parquet')
    pixels = m.Pictures(str(tmp_path), '', '', '', 96, 0)[0]['pixels'].permute(1, 2, 0)
    assert np.abs((pixels.numpy() + 1) * 127.5 - shown).mean() < 3

def test_all_scripts_open_pictures_by_one_function():
    for file in ROOT.glob('*.py'):
        opens = file.read_text().count('Image.open(')
        # besides: what a value is, a picture's size, a prompt inside
        assert opens == dict(model=2, evaluate=2).get(file.stem, 0), file

@pytest.mark.parametrize('folder', ['plain', 'a train [v2] (x) of tests', '\u540d\u524d Jos\u00e9'])
def test_all_files_of_a_folder_are_one_set(folder, tmp_path):
    """Whatever split's name is in a file's: of pictures, of parquet and of tar files; a pattern
    narrows them."""
    folder = tmp_path / folder
    names = 'a train.png', 'crash test.jpg', 'dev/board.png', 'train/x.PNG', 'validation/val.webp'
    for name in names:
        file = folder / 'pictures' / name
        file.parent.mkdir(parents=True, exist_ok=True)
        scene().save(file)
        file.with_suffix('.txt').write_text(name)
    tables = folder / 'tables'
    tables.mkdir()
    for name in ('test', 'train', 'val-0001'):
        row = dict(jpg=[png()], caption=[name])
        datasets.Dataset.from_dict(row).to_parquet(tables / f'{name}.parquet')

    def texts(*source):
        pictures = m.Pictures(*map(str, source), '', '', 64, 0)
        return {pictures[i]['text'] for i in range(len(pictures.rows))}

    assert texts(folder / 'pictures', '') == {*names}
    assert texts(folder / 'pictures', '**/*train*') == {'a train.png'}
    assert texts(folder / 'pictures', 'train/*') == {'train/x.PNG'}
    assert texts(tables, '') == {'test', 'train', 'val-0001'}
    assert texts(tables, 'val*.parquet') == texts(tables / 'val-0001.parquet', '') == {'val-0001'}

def rows_of(folder, **columns):
    """A parquet file of two rows; pictures beside it for those that name them."""
    (folder / 'sub').mkdir(parents=True)
    for name in ('a', 'b'):
        (folder / f'sub/{name}.png').write_bytes(png())
    datasets.Dataset.from_dict(columns).to_parquet(folder / 'x.parquet')
    return str(folder)

PATHS, BYTES = ['sub/a.png', 'sub/b.png'], [png(), png()]
RECORDS = [dict(bytes=png(), path=None)] * 2

@pytest.mark.parametrize('columns, image, text', [
    (dict(image=RECORDS, text=['x', 'y']), 'image', 'text'),
    (dict(picture=BYTES, CAPTION=['x', 'y'], id=[1, 2]), 'picture', 'CAPTION'),
    (dict(file=PATHS, prompt=[['x'], ['y']]), 'file', 'prompt'),
    (dict(image=BYTES, file_name=PATHS, text=['x', 'a.png']), 'image', 'text'),
    (dict(sample=[dict(image=r, json=dict(prompt='x')) for r in RECORDS]), 'sample.image',
     'sample.json.prompt'),
    (dict(jpg=BYTES, txt=[7, 8]), 'jpg', 'txt')])
def test_columns_are_found(columns, image, text, tmp_path):
    """And said. A number is a caption like others; a caption may look like a path."""
    pictures = m.Pictures(rows_of(tmp_path / 'a', **columns), '', '', '', 64, 0)
    assert pictures.said.endswith(f'2 pictures in the column {image}, captions in {text}')
    sample = pictures[0]
    assert sample['pixels'].shape == (3, 64, 64)
    assert [sample['text']] == pictures.captions([0])
    named = m.Pictures(str(tmp_path / 'a'), '', image, text, 64, 0)[0]
    assert named['text'] == sample['text'] and torch.equal(named['pixels'], sample['pixels'])

@pytest.mark.parametrize('columns, says', [
    (dict(image=BYTES, mask=BYTES, text=['x', 'y']),
     'several columns of pictures, image, mask: name one with --image_column'),
    (dict(image=BYTES, text=['x', 'y'], prompt=['x', 'y']),
     'several columns of captions, text, prompt: name one with --text_column'),
    (dict(image=BYTES, words=['x', 'y']),
     'no column of captions among image, words: name one with --text_column'),
    (dict(url=['http://a.b/c.png'] * 2, text=['x', 'y']),
     'no column of pictures among url, text: name one with --image_column')])
def test_columns_that_cannot_be_told_are_listed(columns, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        m.Pictures(rows_of(tmp_path / 'a', **columns), '', '', '', 64, 0)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err

def test_real_pictures_need_no_captions(tmp_path):
    rows_of(tmp_path / 'a', image=BYTES)
    for folder in (tmp_path / 'a', tmp_path / 'a/sub'):
        pictures = m.Pictures(str(folder), '', '', '', 64, 0, '--real', captioned=False)
        assert pictures[0]['pixels'].shape == (3, 64, 64)
        assert len(pictures.rows) == 2

def captioned(folder, files):
    """A folder of the pictures a.png, b.png and sub/c.jpg with these other files."""
    for name in ('a.png', 'b.png', 'sub/c.jpg'):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        scene().save(folder / name)
    for name, text in files.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(folder)

CSV = 'file_name,caption\n"a.png","a, ""q"""\nb.png,None\n'

@pytest.mark.parametrize('files, texts, trouble', [
    ({'a.txt': 'A', 'b.caption': 'B\n', 'sub/c.txt': 'C', 'a.npz': 'x'}, {'A', 'B', 'C'}, 0),
    ({'a.txt': '\ufeffA', 'b.txt': ' \n', 'sub/c.txt': 'C'}, {'A', 'C'}, 1),
    ({'metadata.csv': CSV, 'sub/metadata.csv': 'file_name,caption\nc.jpg,C'},
     {'a, "q"', 'None', 'C'}, 0),
    ({'metadata.csv': '\ufefffile_name;text\r\na.png;7\r\nb.png;\r\nsub/c.jpg;C'}, {'7', 'C'}, 1),
    ({'metadata.jsonl': '{"file_name": "a.png", "text": "A\u2028\\"x"}\n\n'
                        '{"image": "b.png", "text": 7}\n'}, {'A\u2028"x', '7'}, 1),
    ({'metadata.jsonl': '{"file_name": "sub\\\\c.jpg", "text": "C"}'}, {'C'}, 2)])
def test_captions_beside_pictures(files, texts, trouble, tmp_path):
    """NAME.txt, NAME.caption, metadata.jsonl and .csv, in subfolders too; those without are
    counted."""
    pictures = m.Pictures(captioned(tmp_path / 'a', files), '', '', '', 64, 0)
    assert len(pictures.rows) == 3
    samples = [pictures[i] for i in range(3)]
    assert {sample['text'] for sample in samples} == texts
    lone = {str(sample['trouble']) for sample in samples} - {'Counter()'}
    assert bool(lone) == bool(trouble)
    assert {*pictures.captions(range(3))} == texts

def test_one_of_several_captions_is_drawn_by_seed_and_position(tmp_path):
    files = {f'{name}.txt': '\n'.join(f'{name}{k}' for k in range(4))
             for name in ('a', 'b', 'sub/c')}
    folder = captioned(tmp_path / 'a', files)
    one, two, other = (m.Pictures(folder, '', '', '', 64, seed) for seed in (0, 0, 1))
    texts = [one[i]['text'] for i in range(60)]
    assert texts == [two[i]['text'] for i in range(60)] == one.captions(range(60))
    assert len({*texts}) == 12
    assert texts != [other[i]['text'] for i in range(60)]

def test_captions_longer_than_the_text_encoders_read(toy):
    assert toy.cut(['a red circle', 'a red circle on blue ' * 30, '']) == 1

def test_a_limit_takes_the_first(tmp_path, monkeypatch):
    """Of a hub id no more than that is fetched, and what was fetched is kept."""
    rows = dict(jpg=RECORDS * 20, text=[str(i) for i in range(40)])
    folder = tmp_path / 'set'
    folder.mkdir()
    datasets.Dataset.from_dict(rows).to_parquet(folder / 'a.parquet')
    pictures = m.Pictures(str(folder), '', '', '', 64, 0, limit=7)
    assert {*pictures.captions(range(7))} == {*map(str, range(7))}
    read = []
    load = datasets.load_dataset

    def hub(source, data_files, split, streaming=False):
        assert (source, data_files, split, streaming) == ('some/photos', 'a*', 'train', True)
        stream = load(str(folder), split='train', streaming=True)
        return stream.map(lambda x: read.append(1) or x, features=stream.features)

    monkeypatch.setattr(datasets, 'load_dataset', hub)
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
    for _ in range(2):
        pictures = m.Pictures('some/photos', 'a*', '', '', 64, 0, limit=5)
        assert {*pictures.captions(range(5))} == {*map(str, range(5))}
        assert pictures[0]['pixels'].shape == (3, 64, 64)
    assert len(read) <= 6

def test_centre_crop(tmp_path):
    wide = Image.new('RGB', (192, 64), 'red')
    wide.paste('blue', (64, 0, 128, 64))
    (tmp_path / 'a').mkdir()
    wide.save(tmp_path / 'a/0.png')
    (tmp_path / 'a/metadata.jsonl').write_text('{"file_name": "0.png", "text": "x"}')
    pixels = data(tmp_path / 'a')[0]['pixels']
    blue = torch.tensor([-1., -1, 1]).view(3, 1, 1)
    assert torch.allclose(pixels[:, 4:-4, 4:-4], blue, atol=.02)

def test_batches_do_not_depend_on_ranks_or_workers():
    """62 to 67 of 512 pictures in batches of 8: the stream crosses an epoch, which is every row
    once, in another order than the file's."""
    pictures = m.Pictures(str(TOY / 'data'), 'test.parquet', 'image', 'text', 64, 3)

    def texts(mine, its, workers=0):
        return [b['text'] for b in pictures.batches(mine, 8, its, workers)]

    its = range(62, 68)
    one = texts(range(8), its, workers=2)
    two = [texts(mine, its) for mine in (range(4), range(4, 8))]
    assert one == [a + b for a, b in zip(*two)]
    assert len(one) == 6
    assert texts(range(8), [63, 66]) == [one[1], one[4]]
    epoch = [text for batch in texts(range(8), range(64)) for text in batch]
    assert epoch == pictures.captions(range(512))
    held = [pictures._row(pictures.texts, i)['text'] for i in range(512)]
    assert Counter(epoch) == Counter(held)
    assert epoch[:64] != held[:64]

@pytest.mark.parametrize('workers', [0, 2])
def test_files_that_disappear(workers, tmp_path):
    """A few are skipped and counted; all of them end the run with a sentence, from a thread too."""
    folder = folder_of_pictures(tmp_path / 'a', 12)
    batches = data(folder).batches(range(4), 4, range(400), workers)
    next(batches)
    for k in range(4):
        (folder / f'{k}.png').unlink()
    found = [next(batches) for _ in range(20)]
    assert sum(rows['trouble']['missing'] for rows in found) > 5
    assert all(len(rows['text']) == 4 for rows in found)
    shutil.rmtree(folder)
    with pytest.raises(m.Unreadable) as error:
        list(batches)
    assert f'--data {folder}: 24 pictures in a row cannot be used (24 missing' in str(error.value)

@pytest.mark.parametrize('workers', [0, 2])
def test_pictures_are_read_a_little_ahead_by_threads_of_this_process(workers, tmp_path):
    """A process that is forked beside a process group may hang. With none, in the caller's own."""
    pictures = data(folder_of_pictures(tmp_path / 'a', 12))
    read, seen = pictures.__getitem__, []

    class Watched(m.Pictures):
        def __getitem__(self, position):
            seen.append((position, os.getpid(), threading.get_ident()))
            return read(position)

    pictures.__class__ = Watched
    batches = pictures.batches(range(4), 4, range(100), workers)
    for k in range(5):
        next(batches)
    batches.close()
    places, processes, threads = map(set, zip(*seen))
    assert processes == {os.getpid()}
    assert (threading.get_ident() in threads) == (not workers)
    assert max(places) < 4 * (5 + (2 if workers else 0))

@pytest.mark.parametrize('error, says', [
    (m.Unreadable('--data x: 12 in a row'), '--data x: 12 in a row'),
    (OSError(28, 'No space left on device', 'out/log.jsonl'),
     'out/log.jsonl: No space left on device, by the disk, a quota or the number of files'),
    (OSError(122, 'Disk quota exceeded', 'x'), 'x: Disk quota exceeded, by the disk, a quota'),
    (torch.OutOfMemoryError('Tried to allocate 2 GiB'), 'the card is full; in training a smaller'),
    (RuntimeError('[gloo/pair.cc] Connection closed by peer'), 'another rank is lost')])
def test_last_words(error, says, group, capsys, monkeypatch):
    """Ends that are known are one line and code 2, not a traceback, but for a full card's."""
    ended = []
    monkeypatch.setattr(os, '_exit', ended.append)
    m.last_words(type(error), error, None)
    said = capsys.readouterr().err
    assert ended == [2]
    assert said.count('\n') == (2 if 'card' in says else 1)
    assert f'error: rank 0: {says}' in said

# --------------------------------------------------------------------------------------------------
# states

def in_groups(net):
    """An optimiser that counts its weights in another order than the network does."""
    ones, twos = ([w for w in net.parameters() if w.ndim == k] for k in (1, 2))
    return torch.optim.AdamW([dict(params=ones, weight_decay=0.), dict(params=twos)], lr=.1)

OPTIMISERS = dict(
    adamw=lambda net: torch.optim.AdamW(net.parameters(), lr=.1),
    groups=in_groups,
    adafactor=lambda net: torch.optim.Adafactor(net.parameters(), lr=.1))     # rows and columns

def pieces(seed=0, width=3, kind='adamw'):
    """A small network after three steps: itself, its weights and its optimiser as the scripts have
    them."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(width, 7), nn.Linear(7, 3), nn.Linear(3, 2))
    opt = OPTIMISERS[kind](net)
    for _ in range(3):
        net(torch.randn(4, width)).square().mean().backward()
        m.update(opt, net)
    return net, dict(student=m.trained(net)), dict(student=opt)

def settings(**change):
    """A script's arguments, as far as states look at them."""
    own = dict(model='a', lora=0, iters=100, batch=4, disk_full='stop')
    return argparse.Namespace(**own | change)

def save(folder, it, weights, opts, **change):
    with contextlib.redirect_stdout(io.StringIO()):
        m.save_state(folder, it, settings(**change), weights, opts, False, lambda: None)

@pytest.mark.parametrize('kind', OPTIMISERS)
def test_a_state_comes_back_whole_and_the_last_two_stay(kind, group, tmp_path):
    """What a kill left half-written is no state, and gone with the next save."""
    net, named, opts = pieces(kind=kind)
    (tmp_path / 'state-0000005.tmp').mkdir()
    for it in (10, 20, 30):
        save(tmp_path, it, named, opts)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['state-0000020', 'state-0000030']
    (tmp_path / 'state-0000040.tmp').mkdir()
    other, names, others = pieces(1, kind=kind)
    state = m.find_state(tmp_path, settings())
    assert m.iteration_of(state) == 30
    assert m.load_state(state, names, others) == {'student'}
    x = torch.randn(4, 3)
    # equal moments: the next step is the same
    for n, o in ((net, opts), (other, others)):
        n(x).square().mean().backward()
        m.update(o['student'], n)
    for a, b in zip(net.parameters(), other.parameters()):
        assert torch.equal(a, b)
    assert m.find_state(tmp_path / 'empty', settings()) is None
    assert m.iteration_of(None) == 0

def test_a_state_has_plain_names(group, tmp_path):
    """One file a rank, keys of network, kind, the weight's own name and the row where a piece
    begins; and a network without an optimiser is saved and restored as well."""
    net, named, opts = pieces()
    ema = {name: w.detach().clone() for name, w in named['student'].items()}
    save(tmp_path, 10, named | dict(ema=ema), opts)
    kinds = [f'student.{kind}' for kind in ('weight', 'exp_avg', 'exp_avg_sq', 'step')]
    saved = weights(tmp_path, 10)
    assert saved.keys() == {
        f'{kind}/{name}' for kind in [*kinds, 'ema.weight'] for name in net.state_dict()}
    assert torch.equal(saved['student.weight/0.bias'], net[0].bias)
    state = json.loads((tmp_path / 'state-0000010/state.json').read_text())
    assert state['iteration'] == 10
    assert state['args']['model'] == 'a'
    assert list(state['files']) == ['rank0.safetensors']
    keys = load_file(tmp_path / 'state-0000010/rank0.safetensors').keys()
    assert keys == {f'{key}@0' for key in saved}
    other, names, others = pieces(1)
    average = {name: torch.zeros_like(w) for name, w in ema.items()}
    state = tmp_path / 'state-0000010'
    assert m.load_state(state, names | dict(ema=average), others) == {'student', 'ema'}
    assert torch.equal(other[0].bias, net[0].bias)
    assert torch.equal(average['0.bias'], ema['0.bias'])
    assert m.load_state(state, names | dict(heads={}), others, partly=True) >= {'student'}
    _, wide, others = pieces(1, width=4)                      # the same names, other shapes
    assert not m.load_state(state, wide, others, partly=True)

def flip(state):
    """One bit near the end: the file still loads."""
    file = state / 'rank0.safetensors'
    whole = bytearray(file.read_bytes())
    whole[-3] ^= 1
    file.write_bytes(whole)

def truncate(state):
    file = state / 'rank0.safetensors'
    file.write_bytes(file.read_bytes()[:-20])

def pickled(state):
    (state / 'rank0.safetensors').write_bytes(pickle.dumps({'weight': [1]}))

def remove(state):
    (state / 'rank0.safetensors').unlink()

def stray(state):
    """Of a save by two ranks, in a state that one wrote."""
    shutil.copy(state / 'rank0.safetensors', state / 'rank1.safetensors')

def unreadable(state):
    (state / 'state.json').write_text('{')

@pytest.mark.parametrize('spoil', [flip, truncate, pickled, remove, stray, unreadable])
def test_a_damaged_state_is_passed_over(spoil, group, tmp_path, capfd):
    """With a line, and set aside; where it is another run's (--init), it stays where it is."""
    net, named, opts = pieces()
    for it in (10, 20):
        save(tmp_path, it, named, opts)
    sound = weights(tmp_path, 10)
    spoil(tmp_path / 'state-0000020')
    for own, name in (False, 'state-0000020'), (True, 'state-0000020.damaged'):
        state = m.newest_state(tmp_path, own=own)
        said = capfd.readouterr().out
        assert said.count('\n') == 1
        assert f'{tmp_path}/state-0000020 is damaged (' in said
        assert state == tmp_path / 'state-0000010'
        assert {f.name for f in tmp_path.iterdir()} == {'state-0000010', name}
    _, names, others = pieces(1)
    m.load_state(state, names, others)
    save(tmp_path, 11, names, others)
    assert {f.name for f in tmp_path.iterdir()} == {'state-0000010', 'state-0000011'}
    assert equal(weights(tmp_path, 11), sound)

def test_no_sound_state_is_an_end_and_stays_one(group, tmp_path, capfd):
    """Not a new run in the old one's folder: nothing is touched, nothing advises to delete."""
    _, named, opts = pieces()
    for it in (10, 20):
        save(tmp_path, it, named, opts)
        flip(tmp_path / f'state-{it:07d}')
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            m.newest_state(tmp_path)
        out, err = capfd.readouterr()
        assert stop.value.code == 2
        assert err.count('\n') == 1
        assert 'choose another --out' in err
        assert 'delete' not in out + err
        assert out.count('is damaged (rank0.safetensors') == 2
        assert len(m.states_of(tmp_path)) == 2

@pytest.mark.parametrize('change, says', [
    (dict(model='b'), 'holds a run of --model a, not b; choose another --out'),
    (dict(lora=8), 'holds a run of --lora 0, not 8; choose another --out'),
    (dict(rl_ratio=5), 'holds a run of the other stage; choose another --out')])
def test_another_run_is_refused(change, says, group, tmp_path, capsys):
    save(tmp_path, 30, *pieces()[1:])
    with pytest.raises(SystemExit) as stop:
        m.find_state(tmp_path, settings(**change))
    assert stop.value.code == 2
    assert f'--out {tmp_path} {says}' in capsys.readouterr().err

def test_changed_settings_are_told_and_a_finished_run_is_no_error(group, tmp_path, capsys):
    save(tmp_path, 30, *pieces()[1:])
    m.find_state(tmp_path, settings(batch=8))
    assert capsys.readouterr().out.splitlines() == [
        f'resuming {tmp_path}/state-0000030, of iteration 30', '--batch is 8 now, was 4']
    with pytest.raises(SystemExit) as stop:
        m.find_state(tmp_path, settings(iters=30))
    assert not stop.value.code
    assert 'is finished, at 30 of 30 iterations' in capsys.readouterr().out
    torch.distributed.init_process_group(                              # it left the group, too
        'gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)

def test_ten_dropped_updates_end_the_run_and_say_from_where_it_goes_on(group, tmp_path, capsys):
    """A save is only spoken of where there is one."""
    args = settings(log_every=1, wandb='')
    for says in 'it begins anew, none is saved', 'it goes on from state-0000007':
        log = m.Log(tmp_path, 0, torch.device('cpu'), args)
        with pytest.raises(SystemExit) as stop:
            for it in range(10):
                log.count(it, [None])
        assert (stop.value.code, it) == (2, 9)
        assert says in capsys.readouterr().err
        if not m.states_of(tmp_path):
            save(tmp_path, 7, *pieces()[1:])

@pytest.mark.parametrize('width, name', [(5, 'student'), (3, 'fake')])
def test_a_state_of_other_networks_is_a_sentence(width, name, group, tmp_path, capsys):
    """Of another shape, or without one of them."""
    save(tmp_path, 30, *pieces(width=width)[1:])
    _, named, opts = pieces()
    with pytest.raises(SystemExit) as stop:
        m.load_state(tmp_path / 'state-0000030', {name: named['student']}, {name: opts['student']})
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count('\n') == 1
    assert f'{tmp_path}/state-0000030 does not fit these networks' in error

def test_files_reach_the_disk_before_their_names(group, tmp_path, monkeypatch):
    """All of a state's files and its folder are flushed, then comes the one rename, then the folder
    around it is flushed."""
    order = []
    fsync, replace = os.fsync, os.replace

    def flushed(file):
        order.append(os.readlink(f'/proc/self/fd/{file}'))
        return fsync(file)

    def renamed(old, new):
        order.append('rename')
        return replace(old, new)

    monkeypatch.setattr(os, 'fsync', flushed)
    monkeypatch.setattr(os, 'replace', renamed)
    save(tmp_path, 10, *pieces()[1:])
    folder = tmp_path / 'state-0000010'
    files = {f'{folder}.tmp', *(f'{folder}.tmp/{f.name}' for f in folder.iterdir())}
    assert len(files) == 3
    assert {*order[:order.index('rename')]} == files
    assert order[-1] == str(tmp_path)
    # the same of a file and of a folder that take the place of others
    for name in ('x.json', 'folder'):
        for _ in range(2):
            order.clear()
            with m.replacing(tmp_path / name) as tmp:
                if name == 'folder':
                    tmp.mkdir()
                    (tmp / 'y').write_text('new')
                else:
                    tmp.write_text('new')
            assert str(tmp) in order[:order.index('rename')]
            assert name != 'folder' or f'{tmp}/y' in order[:order.index('rename')]
            assert order[-1] == str(tmp_path)

# --------------------------------------------------------------------------------------------------
# other files

@pytest.mark.parametrize('mask, mode', [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_every_file_has_the_umasks_mode(mask, mode, toy, group, tmp_path):
    """Those of a state, of a student of all weights and of a LoRA student."""
    lora = m.lora_config(toy.teacher, 2, 2., 'attention')
    before = os.umask(mask)
    try:
        save(tmp_path, 10, *pieces()[1:])
        for name, net, how in ('a', toy.teacher, None), ('b', toy.trainable(lora), lora):
            m.save_student(tmp_path / name, toy, net, toy.schedule.steps(4), 'float16',
                           dict(base_model='x', recipe='toy', iteration=1, prompts=['x']), how)
    finally:
        os.umask(before)
    files = [file for file in tmp_path.rglob('*') if file.is_file()]
    assert len([file for file in files if file.suffix == '.safetensors']) >= 6
    assert {file.stat().st_mode & 0o777 for file in files} == {mode}

@pytest.mark.parametrize('kind', ['file', 'folder'])
def test_a_failed_write_leaves_the_old_one(kind, tmp_path):
    path = tmp_path / 'x.json'
    if kind == 'folder':
        path.mkdir()
        path = path / 'a'
    path.write_text('old')
    with pytest.raises(KeyError):
        with m.replacing(tmp_path / 'x.json') as tmp:
            if kind == 'folder':
                tmp.mkdir()
            else:
                tmp.write_text('half')
            raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ['x.json']
    assert path.read_text() == 'old'

def test_prompts_are_the_lines_that_say_something(tmp_path):
    """They end at \\n and \\r\\n alone, a BOM is none of them; blank ones where numbers count."""
    text = '\ufeff a fox \r\n\r\nb\u00fcro\u2028x\x0by\x85z\x0cw\n  \nend\n'
    (tmp_path / 'p.txt').write_bytes(text.encode())
    lines = ['a fox', '', 'b\u00fcro\u2028x\x0by\x85z\x0cw', '', 'end']
    assert m.read_prompts(tmp_path / 'p.txt', blank=True) == lines
    assert m.read_prompts(tmp_path / 'p.txt') == [line for line in lines if line]

@pytest.mark.skipif(os.geteuid() == 0, reason='permissions do not bind root')
def test_a_folder_without_write_permission(tmp_path, capsys):
    tmp_path.chmod(0o500)
    for path in (tmp_path, tmp_path / 'new'):
        with pytest.raises(SystemExit) as stop:
            m.writable_folder(path, '--out')
        assert stop.value.code == 2
        assert f'--out {path} cannot be written' in capsys.readouterr().err

def test_no_code_that_runs_what_it_reads():
    """No pickles, no code from the hub, no shell, in the scripts and in what the tests run as
    scripts."""
    files = [*ROOT.glob('*.py'), ROOT / 'tests/make_toy.py', ROOT / 'tests/bench.py']
    assert len(files) >= 8
    for file in files:
        code = file.read_text()
        for word in ('pickle.load', 'Unpickler(', 'trust_remote_code', 'shell=', 'os.system',
                     'os.popen', 'weights_only=False', 'allow_pickle=True', 'yaml.load'):
            assert word not in code, (file.name, word)
        assert not re.search(r'(?<![\w.])(?:eval|exec)\(', code), file.name
        for call in ast.walk(ast.parse(code)):
            name = ast.unparse(call.func) if isinstance(call, ast.Call) else ''
            if name == 'torch.load' or name.endswith('load_state_dict_from_url'):
                assert 'weights_only=True' in ast.unparse(call), (file.name, call.lineno)

# --------------------------------------------------------------------------------------------------
# bases as they are published

def test_a_base_of_which_only_the_fp16_variant_is_there(toy, tmp_path):
    m.load_pipeline(TOY / 'sdxl', '', torch.float16).save_pretrained(tmp_path, variant='fp16')
    assert not list(tmp_path.glob('*/*model.safetensors'))
    base = m.load_base(tmp_path)
    net = base.trainable()
    for name, w in toy.teacher.state_dict().items():
        assert net.state_dict()[name].dtype == torch.float32
        assert torch.equal(net.state_dict()[name], w.half().float())

def test_a_base_in_one_file(toy, tmp_path, monkeypatch, capsys):
    """By diffusers' own loader, configured by what lies beside it, and by a fine-tune's mark that
    it predicts v. Offline and alone, and no safetensors at all: a sentence."""
    file = tmp_path / 'x.safetensors'
    save_file({'model.diffusion_model.x': torch.zeros(1), 'v_pred': torch.zeros(1)}, file)
    (tmp_path / 'y.safetensors').write_text('not one')
    for path in file, tmp_path / 'y.safetensors':
        with pytest.raises(SystemExit) as stop:
            m.load_base(path)
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert f'--model {path} is not the .safetensors file of an SDXL or SD3 model, or' in said
    (tmp_path / 'model_index.json').write_text('{}')
    calls = []

    def whole(path, **how):
        calls.append((path, how))
        return m.load_pipeline(TOY / 'sdxl', '', torch.float32)

    def part(path, **how):
        calls.append((path, how))
        return getattr(toy.pipe, how['subfolder'])

    monkeypatch.setattr(diffusers.StableDiffusionXLPipeline, 'from_single_file', whole)
    for kind in (diffusers.UNet2DConditionModel, diffusers.AutoencoderKL):
        monkeypatch.setattr(kind, 'from_single_file', part)
    base = m.load_base(file)
    base.trainable()
    assert base.schedule.kind == 'v_prediction'
    how = dict(dtype=torch.float32, config=str(tmp_path))
    assert calls == [(str(file), how | extra) for extra in (
        {}, dict(subfolder='vae'), dict(subfolder='unet'))]

@pytest.mark.parametrize('change, says', [
    (lambda pipe: pipe.unet.register_to_config(in_channels=9), 'fill in or edit pictures cannot'),
    (lambda pipe: pipe.unet.register_to_config(sample_size=None), 'has no sample_size'),
    (lambda pipe: pipe.register_modules(scheduler=diffusers.EDMEulerScheduler()), 'EDMEulerSch'),
    (lambda pipe: pipe.register_modules(scheduler=type(pipe.scheduler).from_config(
        pipe.scheduler.config, rescale_betas_zero_snr=True)), 'ends in pure noise (rescale_betas')])
def test_a_base_that_cannot_be_distilled_is_a_sentence(change, says, monkeypatch, capsys):
    pipe = m.load_pipeline(TOY / 'sdxl', '', torch.float32)
    change(pipe)
    monkeypatch.setattr(m, 'load_pipeline', lambda *a: pipe)
    with pytest.raises(SystemExit) as stop:
        m.load_base('x')
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert says in said and said.startswith('error: --model')

def test_statistics_of_a_vae_are_undone():
    """latents_mean and latents_std, as diffusers' pipelines undo them."""
    base = m.load_base(TOY / 'sdxl')
    stream = torch.Generator().manual_seed(0)
    mean, std = torch.randn(16, generator=stream), torch.rand(16, generator=stream) + .5
    base.vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    mean, std = mean.view(1, 16, 1, 1), std.view(1, 16, 1, 1)
    x = torch.randn(2, 3, 64, 64, generator=stream).clamp(-1, 1)
    with torch.no_grad():
        own = base.vae.encode(x).latent_dist.mean
        z = base.latents(x)
        scale = base.vae.config.scaling_factor
        assert torch.allclose(z * std / scale + mean, own, atol=1e-4)
        assert torch.allclose(base.decode(z), base.vae.decode(own).sample, atol=1e-4)

KINDS = [kind for kind in KarrasDiffusionSchedulers.__members__ if kind not in (
    'EDMEulerScheduler', 'DPMSolverSDEScheduler')]              # no table; needs another package
ODD = dict(clip_sample=True, clip_sample_range=.1, thresholding=True, sample_max_value=.1,
           timestep_spacing='trailing', steps_offset=3, set_alpha_to_one=False,
           use_karras_sigmas=True, skip_prk_steps=True, variance_type='fixed_large')

@pytest.mark.parametrize('levels', [
    dict(prediction_type='epsilon'), dict(prediction_type='v_prediction'),
    dict(prediction_type='v_prediction', rescale_betas_zero_snr=True),
    dict(beta_schedule='linear', beta_start=1e-4, beta_end=.02),
    dict(beta_schedule='squaredcos_cap_v2')], ids=str)
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.filterwarnings('ignore')                             # diffusers' own, of Karras sigmas
def test_the_students_scheduler_is_the_sampler_of_training(kind, levels, monkeypatch):
    """Whatever scheduler the base has, and however it is set: noise levels, steps, and what follows
    from a network's output, large ones too."""
    kind = getattr(diffusers, kind)
    takes = inspect.signature(kind).parameters
    if not levels.keys() <= takes.keys():
        pytest.skip('it has no such setting')
    betas = dict(beta_schedule='scaled_linear', beta_start=.00085, beta_end=.012) | levels
    if levels.get('beta_schedule') == 'squaredcos_cap_v2':
        betas['prediction_type'] = 'v_prediction'
    base = kind(**{k: v for k, v in ODD.items() if k in takes} | betas)
    schedule = m.Schedule(base)
    same_sampler(schedule, m.few_step_scheduler(base), monkeypatch)

@pytest.mark.parametrize('beta_schedule', ['sigmoid', 'laplace'])
def test_noise_levels_that_lcms_scheduler_cannot_compute(beta_schedule, monkeypatch):
    base = diffusers.DDPMScheduler(beta_schedule=beta_schedule, prediction_type='v_prediction')
    same_sampler(m.Schedule(base), m.few_step_scheduler(base), monkeypatch)

@pytest.mark.parametrize('base', [
    diffusers.FlowMatchEulerDiscreteScheduler(
        shift=3, use_dynamic_shifting=True, shift_terminal=.1),
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3, use_karras_sigmas=True),
    diffusers.FlowMatchHeunDiscreteScheduler(shift=3),
    diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3, prediction_type='flow_prediction')],
    ids=['dynamic', 'Karras', 'Heun', 'UniPC'])
def test_a_flows_scheduler_is_the_sampler_of_training(base, monkeypatch):
    same_sampler(m.Schedule(base), m.few_step_scheduler(base), monkeypatch)

def test_any_number_of_steps_is_plain_diffusers(toy):
    """Also those that do not divide 1000."""
    few = m.few_step_scheduler(toy.pipe.scheduler)
    for n in (*range(1, 21), 30, 64):
        few.set_timesteps(n)
        assert few.timesteps.tolist() == toy.schedule.steps(n).tolist(), n

def same_sampler(schedule, few, monkeypatch):
    stream = torch.Generator().manual_seed(0)
    steps, x = schedule.steps(4), 5 * torch.randn(2, 4, 8, 8, generator=stream)
    if schedule.kind == 'flow':
        few.set_timesteps(sigmas=[1, .75, .5, .25])
    else:
        few.set_timesteps(4)
    assert few.timesteps.tolist() == steps.tolist()
    noise = torch.randn(4, 2, 4, 8, 8, generator=stream)
    fresh = iter(noise)
    for module in ('lcm', 'flow_match_lcm'):
        monkeypatch.setattr(f'diffusers.schedulers.scheduling_{module}.randn_tensor',
                            lambda *a, **k: next(fresh))
    monkeypatch.setattr(torch, 'randn_like', lambda *a, **k: next(fresh))
    for k, t in enumerate(few.timesteps):
        out = 3 * torch.randn(x.shape, generator=stream)
        x0 = schedule.x0(out, x, steps[k:k + 1].expand(2))
        theirs = few.step(out, t, x).prev_sample
        x = x0 if k == 3 else schedule.noised(x0, noise[k], steps[k + 1:k + 2].expand(2))
        assert torch.allclose(theirs, x, rtol=1e-3, atol=1e-3 * x.abs().max())

# --------------------------------------------------------------------------------------------------
# the exported student

def test_exported_student_is_the_same_sampler_in_plain_diffusers(
        toy, group, tmp_path, monkeypatch):
    """DiffusionPipeline.from_pretrained on the saved folder, its own four steps, the same noise:
    our sampler's picture."""
    import diffusers.schedulers.scheduling_lcm as lcm
    steps = toy.schedule.steps(4)
    facts = dict(base_model='x', recipe='toy', iteration=1, prompts=['a star'])
    m.save_student(tmp_path / 'student', toy, toy.teacher, steps, 'float32', facts)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / 'student')
    stream = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 4, *toy.latent_shape, generator=stream)
    prompts = ['a red circle on blue', 'a striped white star above a green ring on black']
    with torch.no_grad():
        z = m.backward_simulation(toy, toy.teacher, steps, noise, toy.encode(prompts))
        ours = (toy.decode(z) / 2 + .5).clamp(0, 1)
    fresh = iter(noise[:, 1:].unbind(1))
    monkeypatch.setattr(lcm, 'randn_tensor', lambda *a, **k: next(fresh))
    theirs = pipe(prompts, latents=noise[:, 0], num_inference_steps=4, guidance_scale=0.,
                  output_type='pt').images
    assert pipe.scheduler.timesteps.tolist() == [999, 749, 499, 249]
    assert torch.allclose(theirs, ours, atol=2e-3)
    saved = json.loads((tmp_path / 'student/student.json').read_text())
    assert saved == facts | dict(steps=[999, 749, 499, 249])

def test_sdxl_conditioning_is_diffusers(toy):
    """Unconditional embeddings are zeros, and base.predict is the pipeline's own UNet call."""
    assert all((u == 0).all() for u in toy.uncond)
    prompts = ['a red circle on blue'] * 2
    z = torch.randn(2, *toy.latent_shape, generator=torch.Generator().manual_seed(0))
    caught = {}

    def catch(net, args, kwargs, output):
        caught.setdefault('call', (args, kwargs, output[0]))

    hook = toy.teacher.register_forward_hook(catch, with_kwargs=True)
    toy.pipe(prompts, latents=z, num_inference_steps=2, guidance_scale=0., output_type='latent')
    hook.remove()
    (x, t), kwargs, out = caught['call']
    y = toy.encode(prompts)
    assert torch.equal(kwargs['encoder_hidden_states'], y[0])
    assert torch.equal(kwargs['added_cond_kwargs']['text_embeds'], y[1])
    with torch.no_grad():
        assert torch.allclose(toy.predict(toy.teacher, x, t.expand(2), y), out, atol=1e-5)

def test_the_second_half_is_not_computed_for_the_features(toy):
    calls = []
    hook = toy.teacher.up_blocks[0].register_forward_hook(lambda *a: calls.append(1))
    x, t = torch.randn(2, *toy.latent_shape), torch.tensor([999, 249])
    with torch.no_grad():
        maps = toy.features(toy.teacher, x, t, toy.encode(['a', 'b']))
    hook.remove()
    assert [f.shape[1] for f in maps] == toy.channels(toy.teacher)
    assert maps[-1].shape == (2, 128, 4, 4)
    assert not calls

# --------------------------------------------------------------------------------------------------
# the toy world

def test_captions_follow_the_grammar_and_neighbours_differ_in_one_word_group():
    textures, colours, shapes = ('|'.join(words) for words in (
        make_toy.TEXTURES[1:], make_toy.COLOURS, make_toy.SHAPES))
    thing = rf'a (?:(?:{textures}) )?(?:{colours}) (?:{shapes})'
    grammar = re.compile(rf'{thing}(?: (?:left of|above) {thing})? on (?:{colours})')
    for i in range(300):
        scene = make_toy.draw_scene(np.random.default_rng([9, i]))
        assert grammar.fullmatch(make_toy.caption(scene))
        for triple in scene['objects']:
            assert triple[1] != scene['background']
            assert tuple(triple) not in make_toy.UNSEEN
        near = make_toy.neighbours(scene)
        assert len(set(near)) >= 16
        assert make_toy.caption(scene) not in near
        assert all(map(grammar.fullmatch, near))
    assert len(make_toy.UNSEEN) == 19

def test_masks_cover_the_objects():
    rng = np.random.default_rng(0)
    scene = dict(objects=[('plain', 'red', 'circle'), ('plain', 'blue', 'square')],
                 relation='left of', background='black')
    image, masks = make_toy.render(scene, rng)
    for mask, channel in zip(masks, (0, 2)):
        assert mask.any()
        assert image[mask][:, channel].mean() > .5
        assert image[mask][:, 1].mean() < .5
    assert np.argwhere(masks[0])[:, 1].mean() < np.argwhere(masks[1])[:, 1].mean()

def test_held_out_triples_never_occur_in_training():
    unseen = {'a ' + ' '.join(w for w in triple if w != 'plain') for triple in make_toy.UNSEEN}
    train = datasets.load_dataset(
        'parquet', data_files=str(TOY / 'data/train.parquet'), split='train')['text']
    scenes = [text.rsplit(' on ', 1)[0] for text in train]
    things = {x for scene in scenes for x in re.split(r' (?:left of|above) ', scene)}
    assert not things & unseen
    assert len(things) > 150
    for prompt in (TOY / 'data/prompts_unseen.txt').read_text().splitlines():
        assert any(u in prompt for u in unseen)

def test_distances_are_the_closed_forms():
    x, y = np.random.default_rng(0).uniform(-1, 1, (2, 1000)).astype(np.float32)
    box = np.maximum(np.abs(x) - .5, np.abs(y) - .3)
    outside = np.hypot((np.abs(x) - .5).clip(0), (np.abs(y) - .3).clip(0))
    box = np.where(box > 0, outside, box)
    square = make_toy.poly(-.5, -.3, .5, -.3, .5, .3, -.5, .3, r=0)
    assert np.allclose(square(x, y), box, atol=1e-5)
    stroke = make_toy.path(-.5, 0, .1, .5, 0, .1)
    assert np.allclose(stroke(x, y), np.hypot((np.abs(x) - .5).clip(0), y) - .1, atol=1e-4)
    assert np.allclose(make_toy.oval(.2, 0, .4)(x, y), np.hypot(x - .2, y) - .4, atol=1e-3)
    five = make_toy.around(5, 0, 0, make_toy.oval(0, -.5, .2))
    k = np.arange(5) * 2 * np.pi / 5
    each = np.hypot(x - .5 * np.sin(k)[:, None], y + .5 * np.cos(k)[:, None]).min(0) - .2
    assert np.allclose(five(x, y), each, atol=1e-3)

def test_things_are_where_their_caption_says_at_any_size_in_every_style():
    """Masks lie as told and hold the thing's colour; a picture of 128 px is that of 64, finer; no
    two styles look alike."""
    for relation, axis in (('left of', 1), ('above', 0)):
        scene = dict(objects=['red apple', 'car'], relation=relation, background='sand')
        for seed in range(4):
            image, masks = make_toy.world_render(scene, np.random.default_rng(seed), style='flat')
            assert image.dtype == np.float32 and image.shape == (64, 64, 3)
            first, second = (np.argwhere(mask)[:, axis].mean() for mask in masks)
            assert first < second - 16
            assert image[masks[0]].mean(0).argmax() == 0
            assert image[masks[1]].mean(0).argmax() == 2
    image = np.full((64, 64, 3), .5, np.float32)
    make_toy.draw_thing(image, 'penguin', 'flat', np.random.default_rng(0), .5, .5, .4, 0., -1.)
    assert image[40:44, 30:34].min() > .7                           # its belly, drawn last, is seen
    for ground in make_toy.GROUNDS:
        scene = dict(objects=['owl'], relation=None, background=ground)
        looks = []
        for style in make_toy.STYLES:
            small, large = (make_toy.world_render(
                scene, np.random.default_rng(3), style=style, pixels=pixels)[0]
                for pixels in (64, 128))
            looks.append(small)
            large = large.reshape(64, 2, 64, 2, 3).mean((1, 3))
            assert np.abs(large - small).mean() < .05, (ground, style)
        for a, b in itertools.combinations(looks, 2):
            assert np.abs(a - b).mean() > .01

def test_captions_of_the_world_and_their_neighbours():
    grounds, thing = '|'.join(make_toy.GROUNDS), f'an? (?:{"|".join(make_toy.THINGS)})'
    grammar = re.compile(rf'{thing}(?: (?:left of|above) {thing})? on (?:{grounds})')
    for i in range(200):
        scene = make_toy.world_scene(np.random.default_rng([9, i]))
        told = make_toy.world_caption(scene)
        near = [make_toy.world_caption(s) for s in make_toy.world_variants(scene)]
        assert len({*near}) == len(near) >= 16
        assert told not in near
        assert all(map(grammar.fullmatch, [told, *near]))
        pairs = {(name, scene['background']) for name in scene['objects']}
        assert not pairs & make_toy.NEVER
        held = make_toy.world_scene(np.random.default_rng([9, i]), unseen=True)
        assert {(name, held['background']) for name in held['objects']} & make_toy.NEVER
    assert len(make_toy.NEVER) == 14

def test_the_builder_of_the_world_runs_and_its_teacher_predicts_v(tmp_path):
    done = inside('tests/make_toy.py', '--world', '--iters', 1, '--pictures', 64, '--pairs', 32,
                  '--out', tmp_path / 'world', '--work', tmp_path / 'work', '--only', 'data', 'vae',
                  'sam', 'clip', 'teacher', 'pickscore', 'lrm', 'sd3')
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'of real' in done.stdout
    base = m.load_base(tmp_path / 'world/sdxl')
    assert base.latent_shape == (32, 8, 8)
    assert base.pipe.scheduler.config.prediction_type == 'v_prediction'
    prompts = (tmp_path / 'world/data/prompts.txt').read_text().splitlines()
    assert len(prompts) == 256
    assert {text.rsplit(' ', 1)[1] for text in prompts} == {*make_toy.GROUNDS}
    sd3 = m.load_base(tmp_path / 'world/sd3')
    assert sd3.latent_shape == (32, 8, 8)
    longest = max(prompts, key=len)
    assert not sd3.cut([longest])
    m.load_sam_encoder(str(tmp_path / 'world/sam.pth'))
    m.load_latent_reward(str(tmp_path / 'world/lrm'), base)

def test_assets_stay_small():
    files = [f for f in (ROOT / 'assets').rglob('*') if f.is_file()]
    assert sum(f.lstat().st_size for f in files) < 45e6

def test_vae_keeps_held_out_pictures(toy):
    x = torch.from_numpy(make_toy.pictures(64, 2)[1]).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        y = toy.decode(toy.latents(x)).clamp(-1, 1)
    assert -10 * torch.log10((y - x).square().mean() / 4) >= 28

def test_make_toy_runs_end_to_end_at_one_iteration(tmp_path):
    """The builder itself, as far as shapes are not the world: the data, the VAE, the teacher, which
    needs both. A second call skips."""
    command = ['tests/make_toy.py', '--only', 'data', 'vae', 'teacher', '--iters', 1, '--pictures',
               64, '--out', tmp_path / 'toy', '--work', tmp_path / 'work']
    done = inside(*command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {p.name for p in (tmp_path / 'toy').iterdir()} == {'data', 'sdxl'}
    base = m.load_base(tmp_path / 'toy/sdxl')
    assert base.latent_shape == (16, 8, 8)
    again = inside(*command)
    assert again.returncode == 0, again.stderr[-2000:]
    assert again.stdout.count('done already') == 3
