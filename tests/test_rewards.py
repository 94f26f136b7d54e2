"""
rewards.py against independent references at small sizes with random weights in the published files' key layouts: open_clip,
transformers with PIL, plain-torch forwards written from the papers; full sizes on the meta device. No network.

    pytest tests/test_rewards.py
"""

import io
import math
import pickle
import urllib.error

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image

import rewards as r

PROMPTS = ['a red circle on a blue ground', 'Two GREEN squares, left of a star!', 'a tree ' * 80]
open_clip = pytest.importorskip('open_clip', reason='pip install open_clip_torch: the independent reference')


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    torch.manual_seed(0)


def stirred(net):
    """Random weights that make every part matter: an initialised network hardly looks at its input."""
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(random_like(name, p))
    return net.eval()


def random_like(name, p):
    g = torch.Generator().manual_seed(sum(map(ord, name)))
    if 'logit_scale' in name:
        return torch.tensor(4.6)
    if p.ndim < 2:
        return torch.randn(p.shape, generator=g) * .2 + (name.endswith('weight'))
    return torch.randn(p.shape, generator=g) * (.3 if 'embed' in name or 'token' in name else 1.2 / math.sqrt(p[0].numel()))


def pictures(*sizes):
    """Pictures of the toy set, enlarged to (width, height): PIL pictures and tensors (1, 3, H, W) in [0, 1]."""
    import pyarrow.parquet
    rows = pyarrow.parquet.read_table(ROOT / 'assets/toy/data/test.parquet')['image'].to_pylist()
    out = [Image.open(io.BytesIO(row['bytes'])).convert('RGB').resize(size, Image.BICUBIC)
           for row, size in zip(rows, sizes)]
    return out, [torch.from_numpy(np.array(p)).permute(2, 0, 1)[None] / 255 for p in out]


# ------------------------------------------------------------------------------------- small published checkpoints

@pytest.fixture(scope='session')
def tokenizer(tmp_path_factory):
    """A folder with CLIP's own tokenizer, rebuilt from the vocabulary that open_clip ships."""
    from transformers import CLIPImageProcessor, CLIPTokenizer
    own = open_clip.tokenizer.SimpleTokenizer()
    names = {'<start_of_text>': '<|startoftext|>', '<end_of_text>': '<|endoftext|>'}
    folder = tmp_path_factory.mktemp('tokenizer')
    vocabulary = {names.get(k, k): v for k, v in own.encoder.items()}
    CLIPTokenizer(vocab=vocabulary, merges=list(own.bpe_ranks)).save_pretrained(folder)
    CLIPImageProcessor(size={'shortest_edge': 56}, crop_size=56).save_pretrained(folder)
    return folder


def put(folder, tokenizer, file, state):
    """A checkpoint `file` beside a copy of the tokenizer."""
    for f in tokenizer.iterdir():
        (folder / f.name).write_bytes(f.read_bytes())
    torch.save(state, folder / file) if not file.endswith('safetensors') else save_file(state, folder / file)
    return folder


def save_file(state, path):
    from safetensors.torch import save_file
    save_file({k: v.contiguous() for k, v in state.items()}, path)


def small_config():
    from transformers import CLIPConfig
    tower = dict(hidden_size=128, num_attention_heads=2, num_hidden_layers=2, intermediate_size=256, hidden_act='gelu')
    return CLIPConfig(projection_dim=128, text_config=tower | dict(vocab_size=49408, eos_token_id=2),
                      vision_config=tower | dict(image_size=56, patch_size=14))


@pytest.fixture(scope='session')
def hf_clip():
    from transformers import CLIPModel
    return stirred(CLIPModel(small_config()))


@pytest.fixture(scope='session')
def small(tmp_path_factory, tokenizer, hf_clip):
    """name -> a reward at a small size, from a checkpoint in its published layout."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ('pickscore', 'hpsv2', 'mps', 'imagereward', 'aesthetic')}
    hf_clip.save_pretrained(folders['pickscore'])
    for f in tokenizer.iterdir():
        (folders['pickscore'] / f.name).write_bytes(f.read_bytes())
    put(folders['hpsv2'], tokenizer, 'HPS_v2.1_compressed.pt', {'state_dict': small_open_clip().state_dict(), 'epoch': 3})
    put(folders['mps'], tokenizer, 'model.safetensors', random_state(mps_layout(hf_clip.state_dict(), 128, 2)))
    put(folders['imagereward'], tokenizer, 'ImageReward.pt', random_state(blip_layout(**SMALL_BLIP)))
    for f in folders['imagereward'].glob('tokenizer*'):
        f.unlink()
    (folders['imagereward'] / 'vocab.txt').write_text('\n'.join(BERT))
    put(folders['aesthetic'], tokenizer, 'sac+logos+ava1-l14-linearMSE.pth', random_state(mlp_layout(128, 'layers.')))
    return dict(clip=r.Clip(ROOT / 'assets/toy/clip'), pickscore=r.PickScore(folders['pickscore']),
                hpsv2=r.HPSv2(folders['hpsv2']), mps=r.MPS(folders['mps']),
                imagereward=r.ImageReward(folders['imagereward']),
                aesthetic=r.Aesthetic(folders['aesthetic'], clip=folders['pickscore']))


def random_state(layout):
    """name -> shape to random tensors; the constants of MPS's layer norms and rotary angles as they are in its file."""
    def tensor(name, shape):
        if name.endswith('inv_freq'):
            return 1 / 10_000 ** (torch.arange(0, 64, 2) / 64)
        if 'fn.norm.bias' in name:
            return torch.zeros(shape)
        return torch.arange(shape[-1])[None] if 'position_ids' in name else random_like(name, torch.empty(shape))
    return {name: tensor(name, tuple(shape)) for name, shape in layout.items()}


def small_open_clip():
    """Text as wide as the embedding, as in ViT-H: its square projection could be transposed unnoticed."""
    return stirred(open_clip.model.CLIP(
        embed_dim=128, vision_cfg=dict(image_size=56, patch_size=14, width=192, head_width=64, layers=2),
        text_cfg=dict(context_length=77, vocab_size=49408, width=128, heads=2, layers=2)))


def mlp_layout(width, prefix='mlp.layers.'):
    sizes = width, 1024, 128, 64, 16, 1
    return dict(item for i, n, o in zip((0, 2, 4, 6, 7), sizes, sizes[1:]) for item in linear(f'{prefix}{i}', o, n).items())


def linear(name, out, inp):
    return {f'{name}.weight': (out, inp), f'{name}.bias': (out,)}


def norm(name, width):
    return {f'{name}.weight': (width,), f'{name}.bias': (width,)}


SMALL_BLIP = dict(d=128, n=2, grid=4, words=40, h=192, m=2)
BERT = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'a', 'red', 'circle', 'on', 'blue', 'ground', 'two', 'green',
        'squares', ',', 'left', 'of', 'star', '!', 'tr', '##ee', 'tree']


def blip_layout(d=1024, n=24, grid=14, words=30524, h=768, m=12):
    """The keys of ImageReward.pt: BLIP ViT-L/16, BERT with cross-attention (med.py), two unused projections, the head."""
    v, t = 'blip.visual_encoder.', 'blip.text_encoder.'
    out = {v + 'cls_token': (1, 1, d), v + 'pos_embed': (1, grid ** 2 + 1, d), v + 'patch_embed.proj.bias': (d,),
           v + 'patch_embed.proj.weight': (d, 3, 16, 16)} | norm(v + 'norm', d)
    for b in (f'{v}blocks.{i}.' for i in range(n)):
        out |= norm(b + 'norm1', d) | norm(b + 'norm2', d)
        out |= linear(b + 'attn.qkv', 3 * d, d) | linear(b + 'attn.proj', d, d)
        out |= linear(b + 'mlp.fc1', 4 * d, d) | linear(b + 'mlp.fc2', d, 4 * d)
    e = t + 'embeddings.'
    out |= {e + 'position_ids': (1, 512), e + 'position_embeddings.weight': (512, h)}
    out |= {e + 'word_embeddings.weight': (words, h)}
    out |= norm(e + 'LayerNorm', h)
    for b in (f'{t}encoder.layer.{i}.' for i in range(m)):
        for kind, width in ('attention', h), ('crossattention', d):
            out |= linear(f'{b}{kind}.self.query', h, h) | linear(f'{b}{kind}.self.key', h, width)
            out |= linear(f'{b}{kind}.self.value', h, width) | linear(f'{b}{kind}.output.dense', h, h)
            out |= norm(f'{b}{kind}.output.LayerNorm', h)
        out |= linear(b + 'intermediate.dense', 4 * h, h) | linear(b + 'output.dense', h, 4 * h)
        out |= norm(b + 'output.LayerNorm', h)
    return out | linear('blip.vision_proj', 256, d) | linear('blip.text_proj', 256, h) | mlp_layout(h)


def mps_layout(clip, dim=1024, nheads=16, layers=4):
    """The keys of RE-N-Y/mpsv1: transformers' CLIP-H and four pairs of blocks with 64 channels a head."""
    out = {f'mps.model.{k}': v.shape for k, v in clip.items()}
    for i in range(layers):
        c, s = (f'mps.cross_model.layers.{i}.{j}.fn.' for j in (0, 1))
        out |= norm(c + 'norm', dim) | norm(s + 'norm', dim) | {
            c + 'to_q.weight': (64 * nheads, dim), c + 'to_kv.weight': (128, dim), c + 'to_out.weight': (dim, 64 * nheads),
            c + 'ff.0.weight': (8 * dim, dim), c + 'ff.2.weight': (dim, 4 * dim), s + 'rotary_emb.inv_freq': (32,),
            s + 'fused_attn_ff_proj.weight': (64 * nheads + 128 + 8 * dim, dim), s + 'attn_out.weight': (dim, 64 * nheads),
            s + 'ff_out.1.weight': (dim, 4 * dim)}
    return out


# -------------------------------------------------------------------------------------------------------- pictures

@pytest.mark.parametrize('size', [(311, 190), (190, 311), (57, 400), (40, 33), (134, 128)])
@pytest.mark.parametrize('half', [int, round])
def test_fit_is_pils(size, half):
    """To about a grey level: PIL rounds, and clips what overshoots when enlarging, after each of its two passes."""
    from torchvision.transforms import functional as T
    (picture,), (x,) = pictures(size)
    ref = T.resize(picture, 64, T.InterpolationMode.BICUBIC)
    assert ref.size[::-1] == torch.Size(T.resize(x, 64).shape[-2:])
    if half is round:
        ref = T.center_crop(ref, 64)
    else:
        left, top = (ref.width - 64) // 2, (ref.height - 64) // 2
        ref = ref.crop((left, top, left + 64, top + 64))
    off = (r.fit(x, 64, half)[0] - T.to_tensor(ref)).abs() * 255
    assert off.max() < (2.5 if min(size) >= 64 else 8) and off.mean() < .6, (off.max(), off.mean())


@pytest.mark.parametrize('size', [(311, 190), (190, 311), (57, 400), (64, 63), (100, 100)])
def test_letterbox_is_hpsv2s(size):
    from torchvision.transforms import functional as T
    (picture,), (x,) = pictures(size)
    scale = 64 / max(size)
    w, h = (round(s * scale) for s in size)
    ref = T.resize(T.to_tensor(picture), [h, w], T.InterpolationMode.BICUBIC, antialias=True)
    ref = T.pad(ref, [(64 - w) // 2, (64 - h) // 2, 64 - w - (64 - w) // 2, 64 - h - (64 - h) // 2], fill=0)
    assert torch.allclose(r.letterbox(x, 64)[0], ref, atol=1e-5)
    shrunk = T.to_tensor(picture.resize((w, h), Image.BICUBIC))
    top, left = (64 - h) // 2, (64 - w) // 2
    assert (r.letterbox(x, 64)[0, :, top:top + h, left:left + w].clamp(0, 1) - shrunk).abs().max() * 255 < 3.5


# ------------------------------------------------------------------------------------------------- the CLIP family

def scores(reward, xs, prompts=PROMPTS):
    return torch.cat([reward.score(x, [p]) for x, p in zip(xs, prompts)])


SIZES = [(311, 190), (190, 311), (134, 128)]          # the last: an odd margin, so a crop that depends on rounding


def through_pil(picture, processor):
    """A CLIP processor's numbers by PIL: uint8 (3, S, S) resized and cropped, then normalised."""
    size = processor.crop_size['height']
    s = size / min(picture.size)
    p = picture.resize([max(size, int(side * s + 1e-9)) for side in picture.size], Image.BICUBIC)
    left, top = (p.width - size) // 2, (p.height - size) // 2
    x = torch.from_numpy(np.array(p.crop((left, top, left + size, top + size)))).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(y)[:, None, None] for y in (processor.image_mean, processor.image_std))
    return ((x - mean) / std)[None]


@torch.no_grad()
@pytest.mark.parametrize('name', ['clip', 'pickscore'])
def test_clip_and_pickscore_are_transformers(name, small, hf_clip):
    from transformers import AutoProcessor, CLIPModel
    source = ROOT / 'assets/toy/clip' if name == 'clip' else small[name].tokenizer.name_or_path
    processor = AutoProcessor.from_pretrained(source)
    model = CLIPModel.from_pretrained(source, dtype=torch.float32).eval() if name == 'clip' else hf_clip
    files, xs = pictures(*SIZES)
    text = processor.tokenizer(PROMPTS, padding=True, truncation=True, return_tensors='pt',
                               max_length=model.config.text_config.max_position_embeddings)
    logits = torch.cat([model(pixel_values=through_pil(p, processor.image_processor),
                              **{k: v[i:i + 1] for k, v in text.items()}).logits_per_image[0] for i, p in enumerate(files)])
    cosine = logits / model.logit_scale.exp()
    assert cosine.std() > .03                                                       # the comparison means something
    unit = 100 if name == 'clip' else 1
    assert torch.allclose(scores(small[name], xs) / unit, cosine, atol=4e-3)
    if name == 'pickscore':
        exact = torch.cat([model(pixel_values=small[name].pixels(x), **{k: v[i:i + 1] for k, v in text.items()})
                          .logits_per_image[0] for i, x in enumerate(xs)])
        logit = model.logit_scale.exp() * scores(small[name], xs)
        assert torch.allclose(logit, exact, atol=1e-3) and logit.std() > 5
    else:
        assert torch.allclose(small[name].embed_texts(PROMPTS).norm(dim=-1), torch.ones(3))
        own = processor.image_processor([f.resize((64, 64)) for f in files], return_tensors='pt')['pixel_values']
        assert torch.allclose(own, small[name].pixels(torch.cat([
            torch.from_numpy(np.array(f.resize((64, 64)))).permute(2, 0, 1)[None] / 255 for f in files])), atol=1e-5)


@torch.no_grad()
def test_hpsv2_is_open_clip(small):
    model, tokenize = small_open_clip(), open_clip.get_tokenizer('ViT-H-14')
    _, xs = pictures(*SIZES)
    odd = ['\u201ccurly\u201d quotes\u2019 end', 'salt &amp;amp; pepper &lt;3', 'sch\u00c3\u00b6n', '', '\uff21\uff22 wide',
           '\u4e2d\u6587 \ud83e\udd8a'.encode('utf-16', 'surrogatepass').decode('utf-16'), 'tab\tand\nline  ']
    ids = tokenize(PROMPTS + odd)
    assert small['hpsv2'].clip.config.vision_config.image_size == 56
    ours = small['hpsv2'].tokens(PROMPTS + odd)['input_ids']
    for a, b in zip(ids, ours):
        n = int(a.argmax()) + 1
        assert torch.equal(a[:n], b[:n])
    ids = ids[:len(PROMPTS)]
    pixels = torch.cat([r.normal(r.letterbox(x, 56)) for x in xs])
    cosine = (model.encode_image(pixels, normalize=True) * model.encode_text(ids, normalize=True)).sum(-1)
    assert cosine.std() > .05 and torch.allclose(scores(small['hpsv2'], xs), cosine, atol=1e-5)


# ------------------------------------------------------------------------------ MPS and ImageReward in plain torch

def attention(q, k, v, nheads, mask=0):
    """softmax(q k^T / sqrt(head) + mask) v with nheads heads; q (N, D), k and v (M, D), (M, D)."""
    q, k, v = (y.reshape(len(y), nheads, -1).transpose(0, 1) for y in (q, k, v))
    return ((q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]) + mask).softmax(-1) @ v).transpose(0, 1).flatten(1)


def ln(w, name, x, eps=1e-5):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[name + '.weight'] + w[name + '.bias']


def affine(w, name, x):
    return x @ w[name + '.weight'].T + w[name + '.bias']


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def patches(w, name, x, size):
    weight = w[name + '.weight']
    return F.unfold(x[None], size, stride=size)[0].T @ weight.flatten(1).T + w.get(name + '.bias', 0)


def clip_tower(w, prefix, x, nheads, mask=0):
    """CLIP's pre-norm transformer on tokens x (N, D), exact GELU."""
    for i in range(2):
        b = f'{prefix}.encoder.layers.{i}.'
        h = ln(w, b + 'layer_norm1', x)
        q, k, v = (affine(w, f'{b}self_attn.{n}_proj', h) for n in 'qkv')
        x = x + affine(w, b + 'self_attn.out_proj', attention(q, k, v, nheads, mask))
        x = x + affine(w, b + 'mlp.fc2', gelu(affine(w, b + 'mlp.fc1', ln(w, b + 'layer_norm2', x))))
    return x


def mps_reference(w, pixels, ids, condition, threshold):
    """The score of one picture (3, 56, 56) and its prompt's ids: paper section 4, with the published numbers."""
    w = {k.removeprefix('mps.model.').removeprefix('mps.cross_model.'): v for k, v in w.items()}

    def text(ids):
        x = w['text_model.embeddings.token_embedding.weight'][ids] + w['text_model.embeddings.position_embedding.weight']
        causal = torch.full((77, 77), -torch.inf).triu(1)
        x = ln(w, 'text_model.final_layer_norm', clip_tower(w, 'text_model', x, 2, causal))
        return x @ w['text_projection.weight'].T
    words, near = text(ids), text(condition)
    prompt = words[(ids == 49407).nonzero()[0, 0]]
    likeness = (words @ near.T).max(1).values
    mask = torch.where(likeness / likeness.max() > threshold, 0., -torch.inf)
    v = 'vision_model.embeddings.'
    x = torch.cat([w[v + 'class_embedding'][None], patches(w, v + 'patch_embedding', pixels, 14)])
    x = ln(w, 'vision_model.pre_layrnorm', x + w[v + 'position_embedding.weight'])
    x = clip_tower(w, 'vision_model', x, 2) @ w['visual_projection.weight'].T
    turn = torch.exp(1j * torch.arange(len(x))[:, None] / 10_000 ** (torch.arange(32) / 32))          # (N, 32)

    def rotary(y):                                                     # channels c and c + 32 as one complex number
        z = torch.complex(y[..., :32], y[..., 32:]) * (turn if y.ndim == 2 else turn[:, None])
        return torch.cat([z.real, z.imag], -1)
    for i in range(4):
        c, s = f'layers.{i}.0.fn.', f'layers.{i}.1.fn.'
        h = ln(w, c + 'norm', x)
        k, val = (words @ w[c + 'to_kv.weight'].T).split(64, -1)
        up, gate = (h @ w[c + 'ff.0.weight'].T).chunk(2, -1)
        look = attention(h @ w[c + 'to_q.weight'].T, k.repeat(1, 2), val.repeat(1, 2), 2, mask)
        x = x + look @ w[c + 'to_out.weight'].T + (gate * torch.sigmoid(gate) * up) @ w[c + 'ff.2.weight'].T
        q, k, val, ff = (ln(w, s + 'norm', x) @ w[s + 'fused_attn_ff_proj.weight'].T).split([128, 64, 64, 1024], -1)
        up, gate = ff.chunk(2, -1)
        q, k = rotary(q.reshape(-1, 2, 64)).flatten(1), rotary(k)
        x = x + attention(q, k.repeat(1, 2), val.repeat(1, 2), 2) @ w[s + 'attn_out.weight'].T \
            + (gate * torch.sigmoid(gate) * up) @ w[s + 'ff_out.1.weight'].T
    return w['logit_scale'].exp() * (x[0] / x[0].norm()) @ (prompt / prompt.norm()), mask.isinf().float().mean()


@torch.no_grad()
@pytest.mark.parametrize('threshold', [.3, .9])
def test_mps_is_the_papers_formula(small, hf_clip, threshold, monkeypatch):
    mps = small['mps']
    assert mps.threshold == .3
    monkeypatch.setattr(mps, 'threshold', threshold)
    w = random_state(mps_layout(hf_clip.state_dict(), 128, 2))
    _, xs = pictures(*SIZES)
    prompts = PROMPTS[:2] + ['star']
    ids, condition = (mps.tokenizer(p, padding='max_length', truncation=True, max_length=77, return_tensors='pt').input_ids
                      for p in (prompts, mps.condition))
    ref, hidden = zip(*(mps_reference(w, r.normal(r.fit(x, 56))[0], i, condition[0], threshold) for x, i in zip(xs, ids)))
    assert torch.stack(ref).std() > 1 and (threshold == .3 or max(hidden) > .02), hidden
    ours = scores(mps, xs, prompts)
    assert torch.allclose(ours, torch.stack(ref), atol=2e-3), (ours, ref)


@torch.no_grad()
def test_no_score_depends_on_its_batch_mates(small, monkeypatch):
    monkeypatch.setattr(small['mps'], 'threshold', .9)                                # hides some tokens of these prompts
    _, xs = pictures(*[(90, 80)] * 3)
    for name, reward in small.items():
        together = reward.score(torch.cat(xs), PROMPTS)
        assert together.dtype == torch.float32 and together.shape == (3,)
        assert torch.allclose(together, scores(reward, xs), atol=1e-4 * max(1, together.abs().max())), name
        assert torch.allclose(together.flip(0), reward.score(torch.cat(xs[::-1]), PROMPTS[::-1]), atol=1e-3), name


def imagereward_reference(w, pixels, ids, seen):
    """One picture (3, 64, 64) and a prompt's ids, of which `seen` are not padding (arXiv 2201.12086, 2304.05977)."""
    v, t = 'blip.visual_encoder.', 'blip.text_encoder.'
    x = torch.cat([w[v + 'cls_token'][0], patches(w, v + 'patch_embed.proj', pixels, 16)]) + w[v + 'pos_embed'][0]
    for i in range(2):
        b = f'{v}blocks.{i}.'
        q, k, val = affine(w, b + 'attn.qkv', ln(w, b + 'norm1', x, 1e-6)).chunk(3, -1)
        x = x + affine(w, b + 'attn.proj', attention(q, k, val, 2))
        x = x + affine(w, b + 'mlp.fc2', gelu(affine(w, b + 'mlp.fc1', ln(w, b + 'norm2', x, 1e-6))))
    x = ln(w, v + 'norm', x, 1e-6)
    e = t + 'embeddings.'
    y = ln(w, e + 'LayerNorm', w[e + 'word_embeddings.weight'][ids] + w[e + 'position_embeddings.weight'][:len(ids)], 1e-12)
    padding = torch.where(torch.arange(len(ids)) < seen, 0., -torch.inf)
    for i in range(2):
        b = f'{t}encoder.layer.{i}.'
        for kind, keys, mask in ('attention', None, padding), ('crossattention', x, 0):
            q = affine(w, f'{b}{kind}.self.query', y)
            k, val = (affine(w, f'{b}{kind}.self.{n}', y if keys is None else keys) for n in ('key', 'value'))
            h = affine(w, f'{b}{kind}.output.dense', attention(q, k, val, 3, mask))
            y = ln(w, f'{b}{kind}.output.LayerNorm', y + h, 1e-12)
        h = affine(w, b + 'output.dense', gelu(affine(w, b + 'intermediate.dense', y)))
        y = ln(w, b + 'output.LayerNorm', y + h, 1e-12)
    y = y[0]
    for i in (0, 2, 4, 6, 7):
        y = affine(w, f'mlp.layers.{i}', y)
    return (y[0] - .16717362830052426) / 1.0333394966054072


@torch.no_grad()
def test_imagereward_is_the_papers_formula(small):
    w = random_state(blip_layout(**SMALL_BLIP))
    _, xs = pictures(*SIZES)
    words = [[5, 6, 7, 8, 5, 9, 10], [11, 12, 13, 14, 15, 16, 5, 17, 18], [5, 21] * 80]
    ref = []
    for x, ids in zip(xs, words):
        ids = [2] + ids[:33] + [3]
        padded = torch.tensor(ids + [0] * (35 - len(ids)))
        ref.append(imagereward_reference(w, r.normal(r.fit(x, 64, round))[0], padded, len(ids)))
    ref = torch.stack(ref)
    ours = scores(small['imagereward'], xs)
    assert ref.std() > .1 and torch.allclose(ours, ref, atol=1e-4), (ours, ref)


@torch.no_grad()
def test_aesthetic_is_a_linear_head_on_the_unit_embedding(small, hf_clip):
    w = random_state(mlp_layout(128, 'layers.'))
    _, xs = pictures(*SIZES)
    xs = [*xs, torch.rand(1, 3, 56, 59)]
    for x in xs:
        pixels = r.normal(r.fit(x, 56, round))                                      # OpenAI's crop rounds
        y = hf_clip.visual_projection(hf_clip.vision_model(pixels).pooler_output)[0]
        y = y / y.norm()
        for i in (0, 2, 4, 6, 7):
            y = affine(w, f'layers.{i}', y)
        assert torch.allclose(small['aesthetic'].score(x, ['ignored']), y, atol=1e-5)


# --------------------------------------------------------------------------------------------- gradients, counting

@pytest.mark.parametrize('name', ['clip', 'pickscore', 'hpsv2', 'mps', 'imagereward', 'aesthetic'])
def test_gradients_are_finite_differences(small, name):
    """In float64, along a random direction; the networks' own parameters are frozen."""
    reward = small[name]
    reward.double()
    try:
        _, xs = pictures((90, 70))
        x = (.1 + .8 * xs[0].double()).requires_grad_()
        reward.score(x, PROMPTS[:1]).sum().backward()
        d, eps = torch.randn_like(x), 1e-6
        with torch.no_grad():
            slope = (reward.score(x + eps * d, PROMPTS[:1]) - reward.score(x - eps * d, PROMPTS[:1])) / (2 * eps)
        assert x.grad.abs().max() > 0
        assert torch.allclose((x.grad * d).sum(), slope[0], rtol=1e-4, atol=1e-7), ((x.grad * d).sum(), slope)
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


# ---------------------------------------------------------------------------------- published layouts at full size

def meta(layout):
    return {k: torch.empty(tuple(v), device='meta') for k, v in layout.items()}


def h_layout():
    from transformers import CLIPConfig, CLIPModel
    with torch.device('meta'):
        return {k: v.shape for k, v in CLIPModel(CLIPConfig(
            projection_dim=1024,
            text_config=dict(hidden_size=1024, num_attention_heads=16, num_hidden_layers=24, intermediate_size=4096,
                             vocab_size=49408),
            vision_config=dict(hidden_size=1280, num_attention_heads=16, num_hidden_layers=32, intermediate_size=5120,
                               patch_size=14, image_size=224))).state_dict().items()}


def test_full_size_hpsv2_has_open_clips_vit_h():
    with torch.device('meta'):
        model = open_clip.model.CLIP(**open_clip.get_model_config('ViT-H-14'))
    clip = r.clip_of(r.from_open_clip(model.state_dict()))
    assert {k: v.shape for k, v in clip.state_dict().items()} == h_layout()                  # the layout of PickScore_v1
    assert sum(p.numel() for p in clip.parameters()) == sum(p.numel() for p in model.parameters()) == 986_109_441
    c = clip.config
    assert (c.vision_config.num_attention_heads, c.text_config.num_attention_heads) == (16, 16)
    assert (c.vision_config.image_size, c.vision_config.hidden_act, c.text_config.hidden_act) == (224, 'gelu', 'gelu')
    assert clip.vision_model.embeddings.position_ids.tolist() == [list(range(257))]


def test_full_size_mps():
    state = meta(mps_layout({k: torch.empty(v, device='meta') for k, v in h_layout().items()}))
    cross = r.cross_of(r.under(state, 'mps.cross_model.'))
    published = sum(v.numel() for k, v in state.items() if 'cross_model' in k and 'inv_freq' not in k)
    assert sum(p.numel() for p in cross.parameters()) == published and len(cross) == 4
    r.clip_of(r.under(state, 'mps.model.'))
    with pytest.raises(RuntimeError, match='to_out'):
        r.cross_of({k: v for k, v in r.under(state, 'mps.cross_model.').items() if '2.0.fn.to_out' not in k})


def test_full_size_imagereward_and_aesthetic():
    state = meta(blip_layout())
    vision, text = r.blip_of(r.under(state, 'blip.'))
    assert sum(p.numel() for p in vision.parameters()) == sum(v.numel() for k, v in state.items() if 'visual_encoder' in k)
    assert sum(p.numel() for p in text.parameters()) == sum(v.numel() for k, v in state.items()
                                                            if 'text_encoder' in k and 'position_ids' not in k)
    assert (vision.config.image_size, vision.config.num_attention_heads, text.config.num_attention_heads) == (224, 16, 12)
    shapes = [tuple(layer.weight.shape) for layer in r.chain(r.under(state, 'mlp.'))]
    assert shapes == [(1024, 768), (128, 1024), (64, 128), (16, 64), (1, 16)]
    with pytest.raises(RuntimeError, match='Unexpected'):
        r.blip_of(r.under(state | {'blip.text_encoder.more': torch.empty(1, device='meta')}, 'blip.'))


def test_a_formula_is_a_class_and_a_row(monkeypatch):
    """Without home and load; no two rows have one title."""
    class Redness(r.Reward):
        def score(self, images, prompts):
            return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))
    monkeypatch.setitem(r.SCORES, 'redness', (Redness, '', 'redness', '{:.3f}'))
    assert len({title for _, _, title, _ in r.SCORES.values()}) == len(r.SCORES)
    make, source, *_ = r.SCORES['redness']
    assert make(source, 'cpu').score(torch.eye(3)[:, :, None, None].expand(3, 3, 4, 4), [''] * 3).tolist() == [1, -.5, -.5]


# ------------------------------------------------------------------------------------- what cannot be had, and FID

@pytest.mark.parametrize('name', [name for name, (_, source, *_) in r.SCORES.items() if source])
def test_missing_weights_are_one_sentence(name, tmp_path):
    make, default, *_ = r.SCORES[name]
    for source in (default, tmp_path / 'nothing', tmp_path):
        with pytest.raises(r.Unavailable) as error:
            make(source, 'cpu')
        text = str(error.value)
        assert str(source) in text and '\n' not in text and len(text) < 400


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


def test_damaged_and_foreign_files(tmp_path, tokenizer, small):
    good = (ROOT / 'assets/toy/clip/model.safetensors').read_bytes()
    (tmp_path / 'model.safetensors').write_bytes(good[:-100])
    with pytest.raises(r.Unavailable):
        r.MPS(tmp_path)
    (tmp_path / 'model.safetensors').write_bytes(good)                       # a CLIP, but no MPS
    with pytest.raises(r.Unavailable):
        r.MPS(tmp_path)
    for f in (ROOT / 'assets/toy/clip').iterdir():
        (tmp_path / f.name).write_bytes(f.read_bytes())
    from safetensors.torch import load
    state = load(good)
    del state['vision_model.post_layernorm.weight']
    save_file(state, tmp_path / 'model.safetensors')
    with pytest.raises(r.Unavailable, match='post_layernorm'):
        r.Clip(tmp_path)


def test_mirrors_in_safetensors_load_too(tmp_path, tokenizer, small):
    """imscore's copies: open_clip's names under model., the head under mlp."""
    put(tmp_path, tokenizer, 'model.safetensors', {f'model.{k}': v for k, v in small_open_clip().state_dict().items()})
    _, (x,) = pictures((70, 90))
    assert torch.equal(r.HPSv2(tmp_path / 'model.safetensors').score(x, PROMPTS[:1]), small['hpsv2'].score(x, PROMPTS[:1]))


def test_frechet_is_the_closed_form():
    """Gaussians with commuting covariances: |m|^2 + sum (sqrt a - sqrt b)^2; then clean-fid's own, with sqrtm."""
    import cleanfid.fid
    q = torch.linalg.qr(torch.randn(5, 5).double())[0]
    z = torch.randn(4000, 5).double()
    z = (z - z.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T))).T                   # exactly white
    a, b, m = torch.tensor([1., 4, 9, .5, 2]).double(), torch.tensor([2., 1, 3, .1, 5]).double(), torch.randn(5).double()
    x, y = z * a.sqrt() @ q.T, z * b.sqrt() @ q.T + m
    expected = (m.square().sum() + (a.sqrt() - b.sqrt()).square().sum()).item()
    assert r.frechet(x, y) == pytest.approx(expected, rel=1e-9)
    y = torch.randn(500, 5).double() @ torch.randn(5, 5).double()
    assert r.frechet(x, y) == pytest.approx(cleanfid.fid.fid_from_feats(x.numpy(), y.numpy()), rel=1e-6)
    few = torch.randn(20, 64)
    assert abs(r.frechet(few, few)) < 1e-5 and r.frechet(few, few + 1) == pytest.approx(64, rel=1e-4)


def test_fid_of_folders_with_a_stub_for_inception(tmp_path, monkeypatch):
    import cleanfid.fid
    kinds = {'a': (30, 1.), 'b': (60, 2.)}
    for kind, (shift, scale) in kinds.items():
        (tmp_path / kind).mkdir()
        g = np.random.default_rng(0)
        for i in range(12):
            colour = shift + scale * g.integers(0, 40, 3)
            Image.fromarray(np.full((20, 30, 3), colour, np.uint8)).save(tmp_path / kind / f'{i}.png')

    def stub(mode, device, use_dataparallel):
        assert mode == 'clean' and not use_dataparallel
        return lambda x: x.mean((2, 3))
    monkeypatch.setattr(cleanfid.fid, 'build_feature_extractor', stub)
    g = np.random.default_rng(0)
    colours = np.stack([g.integers(0, 40, 3) for _ in range(12)])
    a, b = (torch.from_numpy(shift + scale * colours) for shift, scale in kinds.values())
    expected = (a.mean(0) - b.mean(0)).square().sum() + torch.cov(a.T).trace()             # C_b = 4 C_a
    assert r.fid(sorted((tmp_path / 'a').iterdir()), sorted((tmp_path / 'b').iterdir())) == pytest.approx(expected.item(), rel=1e-3)


def test_fid_without_network_says_so(tmp_path, monkeypatch):
    import cleanfid.inception_torchscript

    def down(*args, **kwargs):
        raise urllib.error.URLError('no network')
    monkeypatch.setattr(cleanfid.inception_torchscript, 'check_download_inception', down)
    with pytest.raises(r.Unavailable, match='Inception') as error:
        r.fid([tmp_path], [tmp_path])
    assert '\n' not in str(error.value)


def test_cmmd_is_its_definition():
    x, y = F.normalize(torch.randn(7, 16), dim=-1), F.normalize(torch.randn(5, 16) + 1, dim=-1)
    k = lambda a, b: np.mean([[math.exp(-((p - q) ** 2).sum().item() / 200) for q in b.double()] for p in a.double()])
    assert r.cmmd(x, y) == pytest.approx(1000 * (k(x, x) + k(y, y) - 2 * k(x, y)), rel=1e-6)
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
    """[1 2 1] / 4 along the rows: energy v cos^4(pi f), f in cycles a pixel, at any picture size."""
    x = noise_pictures(512, height, width, .1)
    assert r.log_spectrum(x).exp().mean(0).tolist() == pytest.approx([.01] * 6, rel=.05)
    x = (x.roll(1, 3) + 2 * x + x.roll(-1, 3)) / 4
    rows, columns = np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing='ij')
    cycles = 64 * np.hypot(rows, columns)
    expected = [.01 * np.mean(np.cos(np.pi * columns[(cycles >= a) & (cycles < b)]) ** 4)
                for a, b in zip([1, 3, 6, 10, 15, 21], [3, 6, 10, 15, 21, 32])]
    assert r.log_spectrum(x).exp().mean(0).tolist() == pytest.approx(expected, rel=.05)


def test_spectrum_of_a_wave_is_in_its_band_whatever_the_brightness():
    wave = .1 * torch.cos(torch.arange(64) * 2 * math.pi * 8 / 64).expand(1, 3, 64, 64)
    dark, bright = r.log_spectrum(wave + .2), r.log_spectrum(wave + .8)
    assert dark.argmax() == 2 and (dark[0, 2] - dark[0, [0, 1, 3, 4, 5]]).min() > 5
    assert torch.allclose(dark[0, 2], bright[0, 2], atol=1e-4)
    assert bright[0, 0] < bright[0, 2] - 5


def test_margins_are_to_the_nearest_other_text():
    class Table:
        rows = {'a': [1., 0], 'b': [0, 1.], 'near': [.6, .8]}

        def embed_texts(self, texts):
            return torch.tensor([self.rows[t] for t in texts])
    vectors = torch.tensor([[1., 0], [1., 0]])
    found = r.margins(Table(), vectors, [0, 1], ['a', 'b'], [['near'], []], 0)
    assert found.tolist() == pytest.approx([100 * (1 - .6), 100 * (0 - 1)])
    assert r.margins(Table(), vectors[:1], [0], ['a'], [[]], 0).tolist() == [0]
