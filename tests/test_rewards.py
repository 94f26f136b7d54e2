"""
rewards.py against independent references at small sizes with random weights in the published files'
key layouts: open_clip, transformers with PIL, plain-torch forwards written from the papers; full
sizes on the meta device. No network.

    pytest tests/test_rewards.py
"""

import io
import math
import pickle
import shutil
import urllib.error

import cleanfid.fid
import cleanfid.inception_torchscript
import numpy as np
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load, save_file
from torchvision.transforms import functional as T
from transformers import AutoProcessor, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

import rewards as r
from conftest import ROOT

open_clip = pytest.importorskip(
    'open_clip', reason='pip install open_clip_torch: the independent reference')

PROMPTS = ['a red circle on a blue ground', 'Two GREEN squares, left of a star!', 'a tree ' * 80]
CLIP = ROOT / 'assets/toy/clip'

@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

def stirred(net):
    """Random weights that make every part matter: an initialised network hardly looks at its
    input."""
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(random_like(name, p))
    return net.eval()

def random_like(name, p):
    """Random numbers in the shape of p, the same for a name at every call."""
    if 'logit_scale' in name:
        return torch.tensor(4.6)
    values = torch.randn(p.shape, generator=torch.Generator().manual_seed(sum(map(ord, name))))
    if p.ndim < 2:
        return values * .2 + name.endswith('weight')
    if 'embed' in name or 'token' in name:
        return values * .3
    return values * (1.2 / math.sqrt(p[0].numel()))

def pictures(*sizes):
    """Pictures of the toy set, enlarged to (width, height): PIL pictures and tensors (1, 3, H, W)
    in [0, 1]."""
    rows = pyarrow.parquet.read_table(ROOT / 'assets/toy/data/test.parquet')['image'].to_pylist()
    images = [Image.open(io.BytesIO(row['bytes'])).convert('RGB').resize(size, Image.BICUBIC)
              for row, size in zip(rows, sizes)]
    return images, [tensor(image)[None] / 255 for image in images]

def tensor(image):
    """A PIL picture, (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)

# --------------------------------------------------------------------------------------------------
# small published checkpoints

@pytest.fixture(scope='session')
def tokenizer(tmp_path_factory):
    """A folder with CLIP's own tokenizer, rebuilt from the vocabulary that open_clip ships."""
    own = open_clip.tokenizer.SimpleTokenizer()
    names = {'<start_of_text>': '<|startoftext|>', '<end_of_text>': '<|endoftext|>'}
    folder = tmp_path_factory.mktemp('tokenizer')
    vocabulary = {names.get(k, k): v for k, v in own.encoder.items()}
    CLIPTokenizer(vocab=vocabulary, merges=list(own.bpe_ranks)).save_pretrained(folder)
    CLIPImageProcessor(size={'shortest_edge': 56}, crop_size=56).save_pretrained(folder)
    return folder

def put(folder, tokenizer, file, state):
    """A checkpoint `file` beside a copy of the tokenizer."""
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    if file.endswith('safetensors'):
        save_file({k: v.contiguous() for k, v in state.items()}, folder / file)
    else:
        torch.save(state, folder / file)

@pytest.fixture(scope='session')
def hf_clip():
    tower = dict(hidden_size=128, num_attention_heads=2, num_hidden_layers=2, intermediate_size=256,
                 hidden_act='gelu')
    return stirred(CLIPModel(CLIPConfig(
        projection_dim=128, text_config=tower | dict(vocab_size=49408, eos_token_id=2),
        vision_config=tower | dict(image_size=56, patch_size=14))))

@pytest.fixture(scope='session')
def small(tmp_path_factory, tokenizer, hf_clip):
    """name -> a reward at a small size, from a checkpoint in its published layout."""
    pickscore, hpsv2, mps, imagereward, aesthetic = (
        tmp_path_factory.mktemp(name)
        for name in ('pickscore', 'hpsv2', 'mps', 'imagereward', 'aesthetic'))
    hf_clip.save_pretrained(pickscore)
    shutil.copytree(tokenizer, pickscore, dirs_exist_ok=True)
    put(hpsv2, tokenizer, 'HPS_v2.1_compressed.pt',
        {'state_dict': small_open_clip().state_dict(), 'epoch': 3})
    put(mps, tokenizer, 'model.safetensors',
        random_state(mps_layout(hf_clip.state_dict(), 128, 2)))
    put(imagereward, tokenizer, 'ImageReward.pt', random_state(blip_layout(**SMALL_BLIP)))
    for file in imagereward.glob('tokenizer*'):
        file.unlink()
    (imagereward / 'vocab.txt').write_text('\n'.join(BERT))
    put(aesthetic, tokenizer, 'sac+logos+ava1-l14-linearMSE.pth',
        random_state(mlp_layout(128, 'layers.')))
    return dict(
        clip=r.Clip(CLIP), pickscore=r.PickScore(pickscore), hpsv2=r.HPSv2(hpsv2), mps=r.MPS(mps),
        imagereward=r.ImageReward(imagereward), aesthetic=r.Aesthetic(aesthetic, clip=pickscore))

def random_state(layout):
    """name -> shape to random tensors; the constants of MPS's layer norms and rotary angles as they
    are in its file."""
    found = {}
    for name, shape in layout.items():
        if name.endswith('inv_freq'):
            found[name] = 1 / 10_000 ** (torch.arange(0, 64, 2) / 64)
        elif 'fn.norm.bias' in name:
            found[name] = torch.zeros(tuple(shape))
        elif 'position_ids' in name:
            found[name] = torch.arange(shape[-1])[None]
        else:
            found[name] = random_like(name, torch.empty(tuple(shape)))
    return found

def small_open_clip():
    """Text as wide as the embedding, as in ViT-H: its square projection could be transposed
    unnoticed."""
    return stirred(open_clip.model.CLIP(
        embed_dim=128,
        vision_cfg=dict(image_size=56, patch_size=14, width=192, head_width=64, layers=2),
        text_cfg=dict(context_length=77, vocab_size=49408, width=128, heads=2, layers=2)))

def linear(name, out, inp):
    return {f'{name}.weight': (out, inp), f'{name}.bias': (out,)}

def norm(name, width):
    return {f'{name}.weight': (width,), f'{name}.bias': (width,)}

MLP = 0, 2, 4, 6, 7                          # the head's linear layers; dropout stands between

def mlp_layout(width, prefix='mlp.layers.'):
    found = {}
    for i, out in zip(MLP, (1024, 128, 64, 16, 1)):
        found |= linear(f'{prefix}{i}', out, width)
        width = out
    return found

SMALL_BLIP = dict(d=128, n=2, grid=4, words=40, h=192, m=2)
BERT = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'a', 'red', 'circle', 'on', 'blue', 'ground',
        'two', 'green', 'squares', ',', 'left', 'of', 'star', '!', 'tr', '##ee', 'tree']

def blip_layout(d=1024, n=24, grid=14, words=30524, h=768, m=12):
    """The keys of ImageReward.pt: BLIP ViT-L/16, BERT with cross-attention (med.py), two unused
    projections, the head."""
    v = 'blip.visual_encoder.'
    found = {f'{v}cls_token': (1, 1, d), f'{v}pos_embed': (1, grid ** 2 + 1, d)}
    found |= {f'{v}patch_embed.proj.bias': (d,), f'{v}patch_embed.proj.weight': (d, 3, 16, 16)}
    found |= norm(f'{v}norm', d)
    for i in range(n):
        b = f'{v}blocks.{i}.'
        found |= norm(f'{b}norm1', d) | norm(f'{b}norm2', d)
        found |= linear(f'{b}attn.qkv', 3 * d, d) | linear(f'{b}attn.proj', d, d)
        found |= linear(f'{b}mlp.fc1', 4 * d, d) | linear(f'{b}mlp.fc2', d, 4 * d)
    t = 'blip.text_encoder.'
    e = f'{t}embeddings.'
    found |= {f'{e}position_ids': (1, 512), f'{e}position_embeddings.weight': (512, h)}
    found |= {f'{e}word_embeddings.weight': (words, h)}
    found |= norm(f'{e}LayerNorm', h)
    for i in range(m):
        b = f'{t}encoder.layer.{i}.'
        for kind, width in ('attention', h), ('crossattention', d):
            found |= linear(f'{b}{kind}.self.query', h, h)
            found |= linear(f'{b}{kind}.self.key', h, width)
            found |= linear(f'{b}{kind}.self.value', h, width)
            found |= linear(f'{b}{kind}.output.dense', h, h)
            found |= norm(f'{b}{kind}.output.LayerNorm', h)
        found |= linear(f'{b}intermediate.dense', 4 * h, h) | linear(f'{b}output.dense', h, 4 * h)
        found |= norm(f'{b}output.LayerNorm', h)
    found |= linear('blip.vision_proj', 256, d) | linear('blip.text_proj', 256, h)
    return found | mlp_layout(h)

def mps_layout(clip, dim=1024, nheads=16, layers=4):
    """The keys of RE-N-Y/mpsv1: transformers' CLIP-H and four pairs of blocks with 64 channels a
    head."""
    inner = 64 * nheads
    found = {f'mps.model.{k}': v.shape for k, v in clip.items()}
    for i in range(layers):
        c = f'mps.cross_model.layers.{i}.0.fn.'
        found |= norm(f'{c}norm', dim)
        found |= {
            f'{c}to_q.weight': (inner, dim), f'{c}to_kv.weight': (128, dim),
            f'{c}to_out.weight': (dim, inner), f'{c}ff.0.weight': (8 * dim, dim),
            f'{c}ff.2.weight': (dim, 4 * dim)}
        s = f'mps.cross_model.layers.{i}.1.fn.'
        found |= norm(f'{s}norm', dim)
        found |= {
            f'{s}rotary_emb.inv_freq': (32,),
            f'{s}fused_attn_ff_proj.weight': (inner + 128 + 8 * dim, dim),
            f'{s}attn_out.weight': (dim, inner), f'{s}ff_out.1.weight': (dim, 4 * dim)}
    return found

# --------------------------------------------------------------------------------------------------
# pictures

@pytest.mark.parametrize('size', [(311, 190), (190, 311), (57, 400), (40, 33), (134, 128)])
@pytest.mark.parametrize('half', [int, round])
def test_fit_is_pils(size, half):
    """To about a grey level: PIL rounds, and clips what overshoots when enlarging, after each of
    its two passes."""
    (picture,), (x,) = pictures(size)
    ref = T.resize(picture, 64, T.InterpolationMode.BICUBIC)
    assert ref.size[::-1] == torch.Size(T.resize(x, 64).shape[-2:])
    if half is round:
        ref = T.center_crop(ref, 64)
    else:
        left, top = (ref.width - 64) // 2, (ref.height - 64) // 2
        ref = ref.crop((left, top, left + 64, top + 64))
    off = (r.fit(x, 64, half)[0] - T.to_tensor(ref)).abs() * 255
    assert off.max() < (2.5 if min(size) >= 64 else 8)
    assert off.mean() < .6

@pytest.mark.parametrize('size', [(311, 190), (190, 311), (57, 400), (64, 63), (100, 100)])
def test_letterbox_is_hpsv2s(size):
    (picture,), (x,) = pictures(size)
    w, h = (round(side * 64 / max(size)) for side in size)
    left, top = (64 - w) // 2, (64 - h) // 2
    ref = T.resize(T.to_tensor(picture), [h, w], T.InterpolationMode.BICUBIC, antialias=True)
    ref = T.pad(ref, [left, top, 64 - w - left, 64 - h - top], fill=0)
    ours = r.letterbox(x, 64)[0]
    assert torch.allclose(ours, ref, atol=1e-5)
    shrunk = T.to_tensor(picture.resize((w, h), Image.BICUBIC))
    ours = ours[:, top:top + h, left:left + w].clamp(0, 1)
    assert (ours - shrunk).abs().max() * 255 < 3.5

# --------------------------------------------------------------------------------------------------
# the CLIP family

def scores(reward, xs, prompts=PROMPTS):
    return torch.cat([reward.score(x, [prompt]) for x, prompt in zip(xs, prompts)])

SIZES = [(311, 190), (190, 311), (134, 128)]       # the last: an odd margin, so rounding shows

def through_pil(picture, processor):
    """A CLIP processor's numbers by PIL: uint8 (3, S, S) resized and cropped, then normalised."""
    size = processor.crop_size['height']
    scale = size / min(picture.size)
    p = picture.resize([max(size, int(side * scale + 1e-9)) for side in picture.size],
                       Image.BICUBIC)
    left, top = (p.width - size) // 2, (p.height - size) // 2
    x = tensor(p.crop((left, top, left + size, top + size))) / 255
    mean, std = (torch.tensor(y)[:, None, None]
                 for y in (processor.image_mean, processor.image_std))
    return ((x - mean) / std)[None]

@torch.no_grad()
@pytest.mark.parametrize('name', ['clip', 'pickscore'])
def test_clip_and_pickscore_are_transformers(name, small, hf_clip):
    source, model, unit = small[name].tokenizer.name_or_path, hf_clip, 1
    if name == 'clip':
        source, unit = CLIP, 100
        model = CLIPModel.from_pretrained(source, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(source)
    images, xs = pictures(*SIZES)
    text = processor.tokenizer(PROMPTS, padding=True, truncation=True, return_tensors='pt',
                               max_length=model.config.text_config.max_position_embeddings)

    def logits(pixels):
        return torch.cat([
            model(pixel_values=p, **{k: v[i:i + 1] for k, v in text.items()}).logits_per_image[0]
            for i, p in enumerate(pixels)])

    found = logits([through_pil(image, processor.image_processor) for image in images])
    cosine = found / model.logit_scale.exp()
    assert cosine.std() > .03                                      # the comparison means something
    assert torch.allclose(scores(small[name], xs) / unit, cosine, atol=4e-3)
    if name == 'pickscore':
        exact = logits([small[name].pixels(x) for x in xs])
        logit = model.logit_scale.exp() * scores(small[name], xs)
        assert torch.allclose(logit, exact, atol=1e-3)
        assert logit.std() > 5
    else:
        assert torch.allclose(small[name].embed_texts(PROMPTS).norm(dim=-1), torch.ones(3))
        images = [image.resize((64, 64)) for image in images]
        theirs = processor.image_processor(images, return_tensors='pt')['pixel_values']
        ours = small[name].pixels(torch.stack([tensor(image) / 255 for image in images]))
        assert torch.allclose(theirs, ours, atol=1e-5)

@torch.no_grad()
def test_hpsv2_is_open_clip(small):
    model, tokenize = small_open_clip(), open_clip.get_tokenizer('ViT-H-14')
    _, xs = pictures(*SIZES)
    odd = ['\u201ccurly\u201d quotes\u2019 end', 'salt &amp;amp; pepper &lt;3', 'sch\u00c3\u00b6n',
           '', '\uff21\uff22 wide', '\u4e2d\u6587 \U0001f98a', 'tab\tand\nline  ']
    ids = tokenize(PROMPTS + odd)
    assert small['hpsv2'].clip.config.vision_config.image_size == 56
    ours = small['hpsv2'].tokens(PROMPTS + odd)['input_ids']
    for a, b in zip(ids, ours):
        n = int(a.argmax()) + 1
        assert torch.equal(a[:n], b[:n])
    pixels = torch.cat([r.normal(r.letterbox(x, 56)) for x in xs])
    seen = model.encode_image(pixels, normalize=True)
    read = model.encode_text(ids[:len(PROMPTS)], normalize=True)
    cosine = (seen * read).sum(-1)
    assert cosine.std() > .05
    assert torch.allclose(scores(small['hpsv2'], xs), cosine, atol=1e-5)

# --------------------------------------------------------------------------------------------------
# MPS and ImageReward in plain torch

def attention(q, k, v, nheads, mask=0):
    """softmax(q k^T / sqrt(head) + mask) v with nheads heads; q (N, D), k and v (M, D), (M, D)."""
    q, k, v = (y.reshape(len(y), nheads, -1).transpose(0, 1) for y in (q, k, v))
    share = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]) + mask).softmax(-1)
    return (share @ v).transpose(0, 1).flatten(1)

def ln(w, name, x, eps=1e-5):
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x * w[f'{name}.weight'] + w[f'{name}.bias']

def affine(w, name, x):
    return x @ w[f'{name}.weight'].T + w[f'{name}.bias']

def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2

def gated(x):
    """SwiGLU: the first half times the second's SiLU."""
    up, gate = x.chunk(2, -1)
    return gate * torch.sigmoid(gate) * up

def mlp(w, one, two, x):
    return affine(w, two, gelu(affine(w, one, x)))

def head(w, prefix, x):
    """The linear layers after which ImageReward and the aesthetic score are one number."""
    for i in MLP:
        x = affine(w, f'{prefix}{i}', x)
    return x

def patches(w, name, x, size):
    weight = w[f'{name}.weight']
    x = F.unfold(x[None], size, stride=size)[0].T
    return x @ weight.flatten(1).T + w.get(f'{name}.bias', 0)

def clip_tower(w, prefix, x, nheads, mask=0):
    """CLIP's pre-norm transformer on tokens x (N, D), exact GELU."""
    for i in range(2):
        b = f'{prefix}.encoder.layers.{i}.'
        h = ln(w, f'{b}layer_norm1', x)
        q, k, v = (affine(w, f'{b}self_attn.{n}_proj', h) for n in 'qkv')
        x = x + affine(w, f'{b}self_attn.out_proj', attention(q, k, v, nheads, mask))
        x = x + mlp(w, f'{b}mlp.fc1', f'{b}mlp.fc2', ln(w, f'{b}layer_norm2', x))
    return x

def mps_reference(w, pixels, ids, condition, threshold):
    """The score of one picture (3, 56, 56) and its prompt's ids, and the share of tokens that the
    condition hides: paper section 4, with the published numbers."""
    w = {k.removeprefix('mps.model.').removeprefix('mps.cross_model.'): v for k, v in w.items()}

    def text(ids):
        e = 'text_model.embeddings.'
        x = w[f'{e}token_embedding.weight'][ids] + w[f'{e}position_embedding.weight']
        causal = torch.full((77, 77), -torch.inf).triu(1)
        x = clip_tower(w, 'text_model', x, 2, causal)
        return ln(w, 'text_model.final_layer_norm', x) @ w['text_projection.weight'].T

    words, near = text(ids), text(condition)
    prompt = words[(ids == 49407).nonzero()[0, 0]]
    likeness = (words @ near.T).max(1).values
    mask = torch.where(likeness / likeness.max() > threshold, 0., -torch.inf)

    e = 'vision_model.embeddings.'
    x = patches(w, f'{e}patch_embedding', pixels, 14)
    x = torch.cat([w[f'{e}class_embedding'][None], x]) + w[f'{e}position_embedding.weight']
    x = clip_tower(w, 'vision_model', ln(w, 'vision_model.pre_layrnorm', x), 2)
    x = x @ w['visual_projection.weight'].T

    # channels c and c + 32 as one complex number, turned by the place
    turn = torch.exp(1j * torch.arange(len(x))[:, None] / 10_000 ** (torch.arange(32) / 32))

    def rotary(y):
        z = torch.complex(y[..., :32], y[..., 32:]) * (turn if y.ndim == 2 else turn[:, None])
        return torch.cat([z.real, z.imag], -1)

    for i in range(4):
        c = f'layers.{i}.0.fn.'
        h = ln(w, f'{c}norm', x)
        q = h @ w[f'{c}to_q.weight'].T
        k, v = (words @ w[f'{c}to_kv.weight'].T).split(64, -1)
        look = attention(q, k.repeat(1, 2), v.repeat(1, 2), 2, mask)
        x = (x + look @ w[f'{c}to_out.weight'].T
             + gated(h @ w[f'{c}ff.0.weight'].T) @ w[f'{c}ff.2.weight'].T)
        s = f'layers.{i}.1.fn.'
        fused = ln(w, f'{s}norm', x) @ w[f'{s}fused_attn_ff_proj.weight'].T
        q, k, v, ff = fused.split([128, 64, 64, 1024], -1)
        q, k = rotary(q.reshape(-1, 2, 64)).flatten(1), rotary(k)
        look = attention(q, k.repeat(1, 2), v.repeat(1, 2), 2)
        x = x + look @ w[f'{s}attn_out.weight'].T + gated(ff) @ w[f'{s}ff_out.1.weight'].T
    score = w['logit_scale'].exp() * (x[0] / x[0].norm()) @ (prompt / prompt.norm())
    return score, mask.isinf().float().mean()

@torch.no_grad()
@pytest.mark.parametrize('threshold', [.3, .9])
def test_mps_is_the_papers_formula(small, hf_clip, threshold, monkeypatch):
    mps = small['mps']
    assert mps.threshold == .3
    monkeypatch.setattr(mps, 'threshold', threshold)
    w = random_state(mps_layout(hf_clip.state_dict(), 128, 2))
    _, xs = pictures(*SIZES)
    prompts = PROMPTS[:2] + ['star']
    ids, condition = (mps.tokenizer(text, padding='max_length', truncation=True, max_length=77,
                                    return_tensors='pt').input_ids
                      for text in (prompts, mps.condition))
    found = [mps_reference(w, r.normal(r.fit(x, 56))[0], i, condition[0], threshold)
             for x, i in zip(xs, ids)]
    ref = torch.stack([score for score, _ in found])
    hidden = max(share for _, share in found)
    assert ref.std() > 1
    assert threshold == .3 or hidden > .02
    ours = scores(mps, xs, prompts)
    assert torch.allclose(ours, ref, atol=2e-3), (ours, ref)

@torch.no_grad()
def test_no_score_depends_on_its_batch_mates(small, monkeypatch):
    monkeypatch.setattr(small['mps'], 'threshold', .9)         # hides some tokens of these prompts
    _, xs = pictures(*[(90, 80)] * 3)
    for name, reward in small.items():
        together = reward.score(torch.cat(xs), PROMPTS)
        assert together.dtype == torch.float32
        assert together.shape == (3,)
        atol = 1e-4 * max(1, together.abs().max())
        assert torch.allclose(together, scores(reward, xs), atol=atol), name
        reverse = reward.score(torch.cat(xs[::-1]), PROMPTS[::-1])
        assert torch.allclose(together.flip(0), reverse, atol=1e-3), name

def imagereward_reference(w, pixels, ids, seen):
    """The score of one picture (3, 64, 64) and a prompt's ids, of which `seen` are not padding
    (arXiv 2201.12086, 2304.05977)."""
    v = 'blip.visual_encoder.'
    x = patches(w, f'{v}patch_embed.proj', pixels, 16)
    x = torch.cat([w[f'{v}cls_token'][0], x]) + w[f'{v}pos_embed'][0]
    for i in range(2):
        b = f'{v}blocks.{i}.'
        q, k, val = affine(w, f'{b}attn.qkv', ln(w, f'{b}norm1', x, 1e-6)).chunk(3, -1)
        x = x + affine(w, f'{b}attn.proj', attention(q, k, val, 2))
        x = x + mlp(w, f'{b}mlp.fc1', f'{b}mlp.fc2', ln(w, f'{b}norm2', x, 1e-6))
    x = ln(w, f'{v}norm', x, 1e-6)

    t = 'blip.text_encoder.'
    e = f'{t}embeddings.'
    y = w[f'{e}word_embeddings.weight'][ids] + w[f'{e}position_embeddings.weight'][:len(ids)]
    y = ln(w, f'{e}LayerNorm', y, 1e-12)
    padding = torch.where(torch.arange(len(ids)) < seen, 0., -torch.inf)
    for i in range(2):
        b = f'{t}encoder.layer.{i}.'
        for kind in ('attention', 'crossattention'):
            keys, mask = (y, padding) if kind == 'attention' else (x, 0)
            q = affine(w, f'{b}{kind}.self.query', y)
            k = affine(w, f'{b}{kind}.self.key', keys)
            val = affine(w, f'{b}{kind}.self.value', keys)
            h = affine(w, f'{b}{kind}.output.dense', attention(q, k, val, 3, mask))
            y = ln(w, f'{b}{kind}.output.LayerNorm', y + h, 1e-12)
        h = mlp(w, f'{b}intermediate.dense', f'{b}output.dense', y)
        y = ln(w, f'{b}output.LayerNorm', y + h, 1e-12)
    return (head(w, 'mlp.layers.', y[0])[0] - .16717362830052426) / 1.0333394966054072

@torch.no_grad()
def test_imagereward_is_the_papers_formula(small):
    w = random_state(blip_layout(**SMALL_BLIP))
    _, xs = pictures(*SIZES)
    words = [[5, 6, 7, 8, 5, 9, 10], [11, 12, 13, 14, 15, 16, 5, 17, 18], [5, 21] * 80]
    ref = []
    for x, ids in zip(xs, words):
        ids = [2] + ids[:33] + [3]
        padded = torch.tensor(ids + [0] * (35 - len(ids)))
        pixels = r.normal(r.fit(x, 64, round))[0]
        ref.append(imagereward_reference(w, pixels, padded, len(ids)))
    ref = torch.stack(ref)
    ours = scores(small['imagereward'], xs)
    assert ref.std() > .1
    assert torch.allclose(ours, ref, atol=1e-4), (ours, ref)

@torch.no_grad()
def test_aesthetic_is_a_linear_head_on_the_unit_embedding(small, hf_clip):
    w = random_state(mlp_layout(128, 'layers.'))
    _, xs = pictures(*SIZES)
    for x in [*xs, torch.rand(1, 3, 56, 59)]:
        pixels = r.normal(r.fit(x, 56, round))                               # OpenAI's crop rounds
        y = hf_clip.visual_projection(hf_clip.vision_model(pixels).pooler_output)[0]
        ref = head(w, 'layers.', y / y.norm())
        assert torch.allclose(small['aesthetic'].score(x, ['ignored']), ref, atol=1e-5)

# --------------------------------------------------------------------------------------------------
# gradients, counting

@pytest.mark.parametrize('name', [
    'clip', 'pickscore', 'hpsv2', 'mps', 'imagereward', 'aesthetic'])
def test_gradients_are_finite_differences(small, name):
    """In float64, along a random direction; the networks' own parameters are frozen."""
    reward = small[name]
    reward.double()
    try:
        _, xs = pictures((90, 70))
        x = (.1 + .8 * xs[0].double()).requires_grad_()
        reward.score(x, PROMPTS[:1]).sum().backward()
        d = torch.randn_like(x)
        eps = 1e-6
        with torch.no_grad():
            after, before = (reward.score(x + way * d, PROMPTS[:1]) for way in (eps, -eps))
        slope = (after - before) / (2 * eps)
        along = (x.grad * d).sum()
        assert x.grad.abs().max() > 0
        assert torch.allclose(along, slope[0], rtol=1e-4, atol=1e-7), (along, slope)
    finally:
        reward.float()
    assert not any(p.requires_grad for p in reward.parameters())

@torch.no_grad()
def test_truncated_prompts_are_counted(small):
    _, xs = pictures((60, 60), (60, 60), (60, 60))
    for name, reward in small.items():
        before = reward.truncated
        reward.score(torch.cat(xs), PROMPTS)
        assert reward.truncated - before == (name != 'aesthetic'), name

# --------------------------------------------------------------------------------------------------
# published layouts at full size

def meta(layout):
    return {k: torch.empty(tuple(v), device='meta') for k, v in layout.items()}

def h_layout():
    """The keys of PickScore_v1, a CLIP ViT-H."""
    config = CLIPConfig(
        projection_dim=1024,
        text_config=dict(
            hidden_size=1024, num_attention_heads=16, num_hidden_layers=24, intermediate_size=4096,
            vocab_size=49408),
        vision_config=dict(
            hidden_size=1280, num_attention_heads=16, num_hidden_layers=32, intermediate_size=5120,
            patch_size=14, image_size=224))
    with torch.device('meta'):
        return {k: v.shape for k, v in CLIPModel(config).state_dict().items()}

def count(tensors):
    return sum(x.numel() for x in tensors)

def test_full_size_hpsv2_has_open_clips_vit_h():
    with torch.device('meta'):
        model = open_clip.model.CLIP(**open_clip.get_model_config('ViT-H-14'))
    clip = r.clip_of(r.from_open_clip(model.state_dict()))
    assert {k: v.shape for k, v in clip.state_dict().items()} == h_layout()
    assert count(clip.parameters()) == count(model.parameters()) == 986_109_441
    vision, text = clip.config.vision_config, clip.config.text_config
    assert (vision.num_attention_heads, text.num_attention_heads) == (16, 16)
    assert (vision.image_size, vision.hidden_act, text.hidden_act) == (224, 'gelu', 'gelu')
    assert clip.vision_model.embeddings.position_ids.tolist() == [list(range(257))]

def test_full_size_mps():
    state = meta(mps_layout(meta(h_layout())))
    whole = r.under(state, 'mps.cross_model.')
    cross = r.cross_of(whole)
    assert len(cross) == 4
    assert count(cross.parameters()) == count(v for k, v in whole.items() if 'inv_freq' not in k)
    r.clip_of(r.under(state, 'mps.model.'))
    with pytest.raises(RuntimeError, match='to_out'):
        r.cross_of({k: v for k, v in whole.items() if '2.0.fn.to_out' not in k})

def test_full_size_imagereward_and_aesthetic():
    state = meta(blip_layout())
    vision, text = r.blip_of(r.under(state, 'blip.'))
    assert count(vision.parameters()) == count(v for k, v in state.items() if 'visual_encoder' in k)
    assert count(text.parameters()) == count(
        v for k, v in state.items() if 'text_encoder' in k and 'position_ids' not in k)
    assert vision.config.image_size == 224
    assert (vision.config.num_attention_heads, text.config.num_attention_heads) == (16, 12)
    shapes = [tuple(layer.weight.shape) for layer in r.chain(r.under(state, 'mlp.'))]
    assert shapes == [(1024, 768), (128, 1024), (64, 128), (16, 64), (1, 16)]
    more = {'blip.text_encoder.more': torch.empty(1, device='meta')}
    with pytest.raises(RuntimeError, match='Unexpected'):
        r.blip_of(r.under(state | more, 'blip.'))

def test_a_formula_is_a_class_and_a_row(monkeypatch):
    """Without home and load; no two rows have one title."""
    class Redness(r.Reward):
        def score(self, images, prompts):
            return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))

    monkeypatch.setitem(r.SCORES, 'redness', (Redness, '', 'redness', '{:.3f}'))
    assert len({title for _, _, title, _ in r.SCORES.values()}) == len(r.SCORES)
    make, source, *_ = r.SCORES['redness']
    pure = torch.eye(3)[:, :, None, None].expand(3, 3, 4, 4)
    assert make(source, 'cpu').score(pure, [''] * 3).tolist() == [1, -.5, -.5]

# --------------------------------------------------------------------------------------------------
# what cannot be had

@pytest.mark.parametrize('name', [name for name, (_, source, *_) in r.SCORES.items() if source])
def test_missing_weights_are_one_sentence(name, tmp_path):
    make, default, *_ = r.SCORES[name]
    for source in (default, tmp_path / 'nothing', tmp_path):
        with pytest.raises(r.Unavailable) as error:
            make(source, 'cpu')
        text = str(error.value)
        assert str(source) in text
        assert '\n' not in text
        assert len(text) < 400

class Payload:
    def __reduce__(self):
        return exec, ("raise AssertionError('a checkpoint was unpickled')",)

@pytest.mark.parametrize('name, file', [
    ('hpsv2', 'HPS_v2_compressed.pt'), ('imagereward', 'ImageReward.pt'),
    ('aesthetic', 'sac+logos+ava1-l14-linearMSE.pth')])
def test_pickled_code_is_refused(name, file, tmp_path):
    torch.save({'state_dict': Payload()}, tmp_path / file)
    with pytest.raises(r.Unavailable, match='pickled code.*RE-N-Y'):
        r.SCORES[name][0](tmp_path, 'cpu')
    (tmp_path / file).write_bytes(pickle.dumps(Payload()))
    with pytest.raises(r.Unavailable, match='safetensors'):
        r.SCORES[name][0](tmp_path / file, 'cpu')

def test_damaged_and_foreign_files(tmp_path):
    file = tmp_path / 'model.safetensors'
    good = (CLIP / 'model.safetensors').read_bytes()
    for content in (good[:-100], good):                             # the second: a CLIP, but no MPS
        file.write_bytes(content)
        with pytest.raises(r.Unavailable):
            r.MPS(tmp_path)
    shutil.copytree(CLIP, tmp_path, dirs_exist_ok=True)
    state = load(good)
    del state['vision_model.post_layernorm.weight']
    save_file(state, file)
    with pytest.raises(r.Unavailable, match='post_layernorm'):
        r.Clip(tmp_path)

def test_mirrors_in_safetensors_load_too(tmp_path, tokenizer, small):
    """imscore's copies: open_clip's names under model., the head under mlp."""
    state = {f'model.{k}': v for k, v in small_open_clip().state_dict().items()}
    put(tmp_path, tokenizer, 'model.safetensors', state)
    _, (x,) = pictures((70, 90))
    mirror = r.HPSv2(tmp_path / 'model.safetensors')
    assert torch.equal(mirror.score(x, PROMPTS[:1]), small['hpsv2'].score(x, PROMPTS[:1]))

# --------------------------------------------------------------------------------------------------
# FID, CMMD, texture, margins

def test_frechet_is_the_closed_form():
    """Gaussians with commuting covariances: |m|^2 + sum (sqrt a - sqrt b)^2; then clean-fid's own,
    with sqrtm."""
    q = torch.linalg.qr(torch.randn(5, 5).double())[0]
    z = torch.randn(4000, 5).double()
    z = z - z.mean(0)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T))).T               # exactly white
    a = torch.tensor([1., 4, 9, .5, 2]).double()
    b = torch.tensor([2., 1, 3, .1, 5]).double()
    m = torch.randn(5).double()
    x = z * a.sqrt() @ q.T
    y = z * b.sqrt() @ q.T + m
    expected = (m.square().sum() + (a.sqrt() - b.sqrt()).square().sum()).item()
    assert r.frechet(x, y) == pytest.approx(expected, rel=1e-9)
    y = torch.randn(500, 5).double() @ torch.randn(5, 5).double()
    theirs = cleanfid.fid.fid_from_feats(x.numpy(), y.numpy())
    assert r.frechet(x, y) == pytest.approx(theirs, rel=1e-6)
    few = torch.randn(20, 64)
    assert abs(r.frechet(few, few)) < 1e-5
    assert r.frechet(few, few + 1) == pytest.approx(64, rel=1e-4)

def test_fid_of_folders_with_a_stub_for_inception(tmp_path, monkeypatch):
    """Features that are the mean colour; the second folder's are those of the first, moved and
    twice as wide."""
    kinds = {'a': (30, 1.), 'b': (60, 2.)}
    colours = np.random.default_rng(0).integers(0, 40, (12, 3))
    for kind, (shift, scale) in kinds.items():
        (tmp_path / kind).mkdir()
        for i, colour in enumerate(shift + scale * colours):
            image = Image.fromarray(np.full((20, 30, 3), colour, np.uint8))
            image.save(tmp_path / kind / f'{i}.png')

    def stub(mode, device, use_dataparallel):
        assert mode == 'clean'
        assert not use_dataparallel
        return lambda x: x.mean((2, 3))

    monkeypatch.setattr(cleanfid.fid, 'build_feature_extractor', stub)
    a, b = (torch.from_numpy(shift + scale * colours) for shift, scale in kinds.values())
    # the covariance of b is 4 times that of a
    expected = (a.mean(0) - b.mean(0)).square().sum() + torch.cov(a.T).trace()
    found = r.fid(*(sorted((tmp_path / kind).iterdir()) for kind in kinds))
    assert found == pytest.approx(expected.item(), rel=1e-3)

def test_fid_without_network_says_so(tmp_path, monkeypatch):
    def down(*args, **kwargs):
        raise urllib.error.URLError('no network')

    monkeypatch.setattr(cleanfid.inception_torchscript, 'check_download_inception', down)
    with pytest.raises(r.Unavailable, match='Inception') as error:
        r.fid([tmp_path], [tmp_path])
    assert '\n' not in str(error.value)

def test_cmmd_is_its_definition():
    x = F.normalize(torch.randn(7, 16), dim=-1)
    y = F.normalize(torch.randn(5, 16) + 1, dim=-1)

    def k(a, b):
        return np.mean([[math.exp(-(p - q).square().sum().item() / 200) for q in b.double()]
                        for p in a.double()])

    expected = 1000 * (k(x, x) + k(y, y) - 2 * k(x, y))
    assert r.cmmd(x, y) == pytest.approx(expected, rel=1e-6)
    assert r.cmmd(x, x) == pytest.approx(0, abs=1e-9)

def noise_pictures(n, height, width, deviation):
    """Grey white noise, (n, 3, height, width)."""
    g = torch.Generator().manual_seed(1)
    return .5 + deviation * torch.randn(n, 1, height, width, generator=g).expand(-1, 3, -1, -1)

def test_sharpness_of_white_noise_is_the_laplacians_norm():
    """The Laplacian of white noise has sqrt(16 + 4) times its deviation; that of a ramp is 0."""
    x = noise_pictures(16, 96, 128, .1)
    assert r.sharpness(x).mean() == pytest.approx(255 * .1 * math.sqrt(20), rel=.02)
    ramp = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)
    assert r.sharpness(ramp).item() == pytest.approx(0, abs=1e-3)

@pytest.mark.parametrize('height, width', [(64, 64), (96, 160)])
def test_spectrum_of_filtered_white_noise_is_the_filters(height, width):
    """[1 2 1] / 4 along the rows: energy v cos^4(pi f), f in cycles a pixel, at any picture
    size."""
    x = noise_pictures(512, height, width, .1)
    assert r.log_spectrum(x).exp().mean(0).tolist() == pytest.approx([.01] * 6, rel=.05)
    x = (x.roll(1, 3) + 2 * x + x.roll(-1, 3)) / 4
    rows, columns = np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing='ij')
    cycles = 64 * np.hypot(rows, columns)
    edges = [1, 3, 6, 10, 15, 21, 32]
    expected = [.01 * np.mean(np.cos(np.pi * columns[(cycles >= a) & (cycles < b)]) ** 4)
                for a, b in zip(edges, edges[1:])]
    assert r.log_spectrum(x).exp().mean(0).tolist() == pytest.approx(expected, rel=.05)

def test_spectrum_of_a_wave_is_in_its_band_whatever_the_brightness():
    wave = .1 * torch.cos(torch.arange(64) * 2 * math.pi * 8 / 64).expand(1, 3, 64, 64)
    dark, bright = r.log_spectrum(wave + .2), r.log_spectrum(wave + .8)
    assert dark.argmax() == 2
    assert (dark[0, 2] - dark[0, [0, 1, 3, 4, 5]]).min() > 5
    assert torch.allclose(dark[0, 2], bright[0, 2], atol=1e-4)
    assert bright[0, 0] < bright[0, 2] - 5

def test_margins_are_to_the_nearest_other_text():
    class Table:
        rows = {'a': [1., 0], 'b': [0, 1.], 'near': [.6, .8]}

        def embed_texts(self, texts):
            return torch.tensor([self.rows[text] for text in texts])

    vectors = torch.tensor([[1., 0], [1., 0]])
    found = r.margins(Table(), vectors, [0, 1], ['a', 'b'], [['near'], []], 0)
    assert found.tolist() == pytest.approx([100 * (1 - .6), 100 * (0 - 1)])
    assert r.margins(Table(), vectors[:1], [0], ['a'], [[]], 0).tolist() == [0]
