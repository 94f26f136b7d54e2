"""
Pixel-space rewards and metrics: one class per published model, rebuilt on transformers' networks.

    reward = PickScore()                       # a hub id, a folder or a file; Unavailable says what is missing
    reward.score(images, prompts)              # (B, 3, H, W) in [0, 1], any H and W, and B strings -> (B,) float32

Scores carry gradients to the images. Weights are float32 and frozen; no checkpoint is unpickled. `truncated` counts the
scored prompts that were longer than the text encoder, `unit` names the printed scale, `home` is the default source.
"""

import contextlib
import functools
import math
import pickle
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

CLIP_L, CLIP_H = 'openai/clip-vit-large-patch14', 'laion/CLIP-ViT-H-14-laion2B-s32B-b79K'
MEAN, STD = (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711)     # of every CLIP and BLIP below

# ---------------------------------------------------------------------------------------------------------------------
# checkpoints


class Unavailable(Exception):
    """A model or library that cannot be had here; the message is one sentence with the way out."""


@contextlib.contextmanager
def loading(source, mirror=''):
    """Turns what a missing, damaged or foreign checkpoint raises into Unavailable; mirror: a copy in safetensors."""
    from safetensors import SafetensorError
    try:
        yield
    except pickle.UnpicklingError as error:
        raise Unavailable(f'{source} is damaged or holds pickled code, which is not run here; '
                          + (f'use its copy in safetensors, {mirror}, or ' if mirror else '')
                          + 'save its state dict as safetensors where you trust it') from error
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, EOFError, SafetensorError) as error:
        raise Unavailable(f'{source} could not be found, downloaded or read as this model; give the path of a whole copy '
                          f'({" ".join(str(error).split())[:160]})') from error


def read(source, *names):
    """The state dict of a checkpoint: `source` is the file, or a folder or hub id with one of the files `names`."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError
    path = Path(source)
    if path.is_dir():
        path = next((path / name for name in names if (path / name).exists()), path / names[0])
    elif not path.exists():
        for name in names:
            with contextlib.suppress(RemoteEntryNotFoundError):
                path = Path(hf_hub_download(str(source), name))
                break
        else:
            raise FileNotFoundError(f'no {" or ".join(names)} there')
    if path.suffix == '.safetensors':
        from safetensors.torch import load_file
        return load_file(path)
    state = torch.load(path, map_location='cpu', weights_only=True)
    return state.get('state_dict', state)


def beside(source, default):
    """Where the tokenizer of `source` is: in its own folder if one is there, else in the hub id `default`."""
    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    own = Path(source).exists() and any((folder / name).exists() for name in ('tokenizer.json', 'vocab.json', 'vocab.txt'))
    return str(folder) if own else default


def under(state, prefix):
    """The entries of a state dict under a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def renamed(state, names):
    """A state dict with each (old, new) of names replaced in its keys, in order."""
    return {functools.reduce(lambda key, pair: key.replace(*pair), names, k): v for k, v in state.items()}


def assembled(network, config, state, **kwargs):
    """network(config) with exactly the tensors of `state`; built on meta, since initial weights would take a minute."""
    with torch.device('meta'):
        net = network(config, **kwargs)
    net.load_state_dict({k: v for k, v in state.items() if not k.endswith('position_ids')}, strict=True, assign=True)
    for module in net.modules():
        if 'position_ids' in module._buffers:                   # 0, 1, ...: old files have it, new networks do not save it
            module.position_ids = torch.arange(module.position_ids.shape[-1])[None]
    return net


def frozen(net, device):
    return net.float().to(device).eval().requires_grad_(False)


def heads(width):
    """Attention heads, which no tensor's shape tells: 64 channels each, but 80 in the vision tower of ViT-H (1280)."""
    return 16 if width == 1280 else width // 64


def depth(state, layer):
    """How many numbered layers follow `layer` in the keys."""
    return len({k.removeprefix(layer).split('.')[0] for k in state if k.startswith(layer)})


def tokenize(reward, texts, length):
    """Token ids and mask (B, length), padded and cut to it; reward.truncated grows by the texts that were cut."""
    reward.truncated += sum(len(ids) > length for ids in reward.tokenizer(texts, verbose=False)['input_ids'])
    return reward.tokenizer(texts, padding='max_length', truncation=True, max_length=length, return_tensors='pt')


# ---------------------------------------------------------------------------------------------------------------------
# pictures


def fit(images, size, half=int):
    """(B, 3, H, W) -> (B, 3, size, size): shorter side to size, bicubic as PIL's, centre crop.

    half: how a half pixel of offset is rounded, int as in transformers, round as in torchvision.
    """
    h, w = images.shape[-2:]
    h, w = (size, size * w // h) if h <= w else (size * h // w, size)
    x = F.interpolate(images, (h, w), mode='bicubic', antialias=True).clamp(0, 1)      # PIL's pictures cannot overshoot
    top, left = half((h - size) / 2), half((w - size) / 2)
    return x[..., top:top + size, left:left + size]


def letterbox(images, size):
    """(B, 3, H, W) -> (B, 3, size, size): longer side to size, bicubic, black around; HPSv2's own, which may overshoot."""
    h, w = images.shape[-2:]
    h, w = round(h * size / max(h, w)), round(w * size / max(h, w))
    x = F.interpolate(images, (h, w), mode='bicubic', antialias=True)
    top, left = (size - h) // 2, (size - w) // 2
    return F.pad(x, (left, size - w - left, top, size - h - top))


def normal(images, mean=MEAN, std=STD):
    return (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]


# ---------------------------------------------------------------------------------------------------------------------
# the CLIP family


def clip_of(state):
    """A CLIPModel of the sizes of a state dict in transformers' names: GELU, text pooled at the greatest id (open_clip)."""
    from transformers import CLIPConfig, CLIPModel

    def tower(part):
        width = len(part['encoder.layers.0.layer_norm1.weight'])
        return dict(hidden_size=width, num_attention_heads=heads(width), num_hidden_layers=depth(part, 'encoder.layers.'),
                    intermediate_size=len(part['encoder.layers.0.mlp.fc1.weight']), hidden_act='gelu')

    text, vision = under(state, 'text_model.'), under(state, 'vision_model.')
    patch = vision['embeddings.patch_embedding.weight'].shape[-1]
    side = math.isqrt(len(vision['embeddings.position_embedding.weight']) - 1)
    text_config = dict(vocab_size=len(text['embeddings.token_embedding.weight']), eos_token_id=2,       # 2: that pooling
                       max_position_embeddings=len(text['embeddings.position_embedding.weight']))
    return assembled(CLIPModel, CLIPConfig(
        projection_dim=len(state['text_projection.weight']), text_config=tower(text) | text_config,
        vision_config=tower(vision) | dict(patch_size=patch, image_size=side * patch)), state)


def pretrained_clip(source):
    """A CLIPModel from a folder or hub id in transformers' format; every tensor must be there."""
    from transformers import CLIPModel
    clip, found = CLIPModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    wrong = [k for k in (*found['missing_keys'], *found['unexpected_keys']) if not k.endswith('position_ids')]
    if wrong:
        raise ValueError(f'{len(wrong)} tensors are missing or foreign, such as {wrong[0]}')
    return clip


class Clip:
    """CLIP score: cosine of picture and prompt (arXiv 2104.08718, without its factor 2.5 and its cut at 0)."""
    home, unit, scale = CLIP_L, '100 x cosine', 100

    def __init__(self, source=home, device='cpu'):
        with loading(source):
            self.prepare(pretrained_clip(source), source, device, own_processor=True)

    def prepare(self, clip, processor, device, own_processor=False):
        """Keeps the network, the tokenizer and, with own_processor, the colour normalisation of a folder or hub id."""
        from transformers import CLIPImageProcessor, CLIPTokenizer
        self.clip, self.tokenizer = frozen(clip, device), CLIPTokenizer.from_pretrained(processor)
        self.size, self.mean, self.std, self.truncated = clip.config.vision_config.image_size, MEAN, STD, 0
        if own_processor:
            images = CLIPImageProcessor.from_pretrained(processor)
            self.mean, self.std = images.image_mean, images.image_std
            if (images.size['shortest_edge'], images.crop_size['height']) != (self.size, self.size):
                raise ValueError(f'its pictures are not brought to {self.size} by the shorter side and a centre crop')

    def pixels(self, images):
        """(B, 3, H, W) in [0, 1] -> the network's input (B, 3, size, size)."""
        return normal(fit(images.to(self.clip.device, self.clip.dtype), self.size), self.mean, self.std)

    def tokens(self, texts):
        """Token ids (B, T). No mask is needed: attention is causal and padding comes last."""
        return tokenize(self, texts, self.clip.config.text_config.max_position_embeddings)['input_ids'].to(self.clip.device)

    def embed_images(self, images):
        """(B, 3, H, W) in [0, 1] -> unit vectors (B, D), differentiable."""
        return F.normalize(self.clip.visual_projection(self.clip.vision_model(self.pixels(images)).pooler_output), dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts):
        """B strings -> unit vectors (B, D)."""
        return F.normalize(self.clip.text_projection(self.clip.text_model(self.tokens(texts)).pooler_output), dim=-1)

    def score(self, images, prompts):
        return self.scale * (self.embed_images(images) * self.embed_texts(prompts)).sum(-1)


class PickScore(Clip):
    """Cosine of a CLIP-H tuned on choices of Pick-a-Pic (arXiv 2305.01569)."""
    home, unit, scale = 'yuvalkirstain/PickScore_v1', 'cosine', 1

    def __init__(self, source=home, device='cpu'):
        with loading(source):
            self.prepare(pretrained_clip(source), beside(source, CLIP_H), device, own_processor=True)

    def logit(self, images, prompts):
        """The paper's s(x, y) = exp(logit_scale) x cosine, about 100 x score."""
        return self.clip.logit_scale.exp() * self.score(images, prompts)


OPEN_CLIP = (       # open_clip's names, transformers' names
    ('visual.transformer.resblocks', 'vision_model.encoder.layers'), ('transformer.resblocks', 'text_model.encoder.layers'),
    ('visual.conv1', 'vision_model.embeddings.patch_embedding'),
    ('visual.class_embedding', 'vision_model.embeddings.class_embedding'),
    ('visual.positional_embedding', 'vision_model.embeddings.position_embedding.weight'),
    ('visual.ln_pre', 'vision_model.pre_layrnorm'), ('visual.ln_post', 'vision_model.post_layernorm'),
    ('token_embedding', 'text_model.embeddings.token_embedding'),
    ('positional_embedding', 'text_model.embeddings.position_embedding.weight'),
    ('ln_final', 'text_model.final_layer_norm'), ('attn.out_proj', 'self_attn.out_proj'),
    ('ln_1', 'layer_norm1'), ('ln_2', 'layer_norm2'), ('mlp.c_fc', 'mlp.fc1'), ('mlp.c_proj', 'mlp.fc2'))


def from_open_clip(state):
    """open_clip's state dict of a ViT in transformers' names: q, k, v apart, projections transposed."""
    out = {}
    for key, value in renamed(state, OPEN_CLIP).items():
        if 'attn.in_proj_' in key:
            out |= {key.replace('attn.in_proj_', f'self_attn.{name}_proj.'): part
                    for name, part in zip('qkv', value.chunk(3))}
        elif key in ('visual.proj', 'text_projection'):
            out[{'visual.proj': 'visual_projection'}.get(key, key) + '.weight'] = value.T.contiguous()
        else:
            out[key] = value
    return out


class HPSv2(Clip):
    """Cosine of a CLIP-H tuned on choices of HPD v2 (arXiv 2306.09341); the versions' numbers are not comparable."""
    home, unit, scale = 'xswu/HPSv2', 'cosine', 1
    files = {'hpsv2': 'HPS_v2_compressed.pt', 'hpsv2.1': 'HPS_v2.1_compressed.pt'}

    def __init__(self, source=home, device='cpu', version='hpsv2.1'):
        with loading(source, 'RE-N-Y/hpsv21 for v2.1'):
            # the copy's name does not tell the version, and it is v2.1
            state = read(source, self.files[version], *['model.safetensors'] * (version == 'hpsv2.1'))
            self.prepare(clip_of(from_open_clip(under(state, 'model.') or state)), beside(source, CLIP_H), device)

    def pixels(self, images):
        return normal(letterbox(images.to(self.clip.device, self.clip.dtype), self.size))


# ---------------------------------------------------------------------------------------------------------------------
# MPS


class ParallelBlock(nn.Module):
    """x + attention(x) + SwiGLU(x) from one layer norm, no biases, one key and value for all heads (PaLM, 2204.02311)."""

    def __init__(self, dim, inner, head, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.to_q, self.to_kv = nn.Linear(dim, inner, bias=False), nn.Linear(dim, 2 * head, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)
        self.ff, self.ff_out = nn.Linear(dim, 2 * hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x, context=None, mask=None):
        """x (B, N, D); keys and values from context (B, M, D), where mask (B, 1, 1, M) allows, else from x itself."""
        h = self.norm(x)
        k, v = self.to_kv(h if context is None else context)[:, None].chunk(2, -1)              # (B, 1, M, head)
        q = self.to_q(h).unflatten(-1, (-1, k.shape[-1])).transpose(1, 2)                       # (B, heads, N, head)
        if context is None:
            q, k = rotated(q), rotated(k)
        out = F.scaled_dot_product_attention(q, *(y.expand(-1, q.shape[1], -1, -1) for y in (k, v)), attn_mask=mask)
        value, gate = self.ff(h).chunk(2, -1)
        return x + self.to_out(out.transpose(1, 2).flatten(2)) + self.ff_out(F.silu(gate) * value)


def rotated(x):
    """Rotary positions 0..N-1 on x (..., N, C): channels c and c + C/2 turn by n / 10000^(2c/C) (arXiv 2104.09864)."""
    n, c = x.shape[-2:]
    angle = torch.arange(n).to(x)[:, None] / 10_000 ** (torch.arange(0, c, 2).to(x) / c)                # (N, C/2)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def cross_of(state):
    """MPS's cross model from its state dict: pairs of blocks, one that looks at the prompt, one at the picture itself."""
    out = {}
    for key, value in state.items():
        if key.endswith('fused_attn_ff_proj.weight'):
            layer = key.removesuffix('fused_attn_ff_proj.weight')
            inner, hidden = state[layer + 'attn_out.weight'].shape[1], state[layer + 'ff_out.1.weight'].shape[1]
            parts = value.split([inner, len(value) - inner - 2 * hidden, 2 * hidden])
            out |= {f'{layer}{name}.weight': part for name, part in zip(('to_q', 'to_kv', 'ff'), parts)}
        elif not key.endswith('inv_freq'):                                             # rotary constants
            out[key] = value
    out = renamed(under(out, 'layers.'), [('.fn.', '.'), ('ff.0.', 'ff.'), ('ff.2.', 'ff_out.'), ('ff_out.1.', 'ff_out.'),
                                          ('attn_out.', 'to_out.')])
    inner, dim = out['0.0.to_q.weight'].shape
    sizes = dim, inner, len(out['0.0.to_kv.weight']) // 2, len(out['0.0.ff.weight']) // 2
    return assembled(lambda n: nn.ModuleList(nn.ModuleList(ParallelBlock(*sizes) for _ in range(2)) for _ in range(n)),
                     depth(out, ''), out)


class MPS(Clip):
    """exp(logit_scale) x cosine of a CLIP-H whose picture tokens attend to the prompt's (arXiv 2405.14705), overall score.

    threshold: the picture sees those tokens of the prompt whose likeness to the condition is above this share of the
    prompt's greatest: .3 in the published evaluations, .01 in the model's own forward pass.
    """
    home, unit = 'RE-N-Y/mpsv1', 'exp(logit_scale) x cosine'
    condition = ('light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, '
                 'instance, texture, quantity, attributes, position, number, location, word, things.')

    def __init__(self, source=home, device='cpu', threshold=.3):
        with loading(source, 'RE-N-Y/mpsv1'):
            state = read(source, 'model.safetensors')
            state = under(state, 'mps.') or state
            self.prepare(clip_of(under(state, 'model.')), beside(source, CLIP_H), device)
            self.cross, self.threshold = frozen(cross_of(under(state, 'cross_model.')), device), threshold
            self.wanted = self.read_texts([self.condition])[0][0]                                       # (T, D)
            self.truncated = 0

    @torch.no_grad()
    def read_texts(self, texts):
        """B strings -> projected tokens (B, T, D), padding too, and the projected pooled token (B, D)."""
        out = self.clip.text_model(self.tokens(texts))
        return self.clip.text_projection(out.last_hidden_state), self.clip.text_projection(out.pooler_output)

    def score(self, images, prompts):
        words, prompt = self.read_texts(prompts)
        near = (words @ self.wanted.T.to(words)).amax(-1)                                               # (B, T)
        mask = near / near.amax(-1, keepdim=True) > self.threshold    # the reference takes the maximum over batch mates too
        x = self.clip.visual_projection(self.clip.vision_model(self.pixels(images)).last_hidden_state)  # (B, 257, D)
        for look, think in self.cross:
            x = think(look(x, words, mask[:, None, None]))
        return self.clip.logit_scale.exp() * F.cosine_similarity(x[:, 0], prompt)


# ---------------------------------------------------------------------------------------------------------------------
# linear heads: ImageReward, Aesthetic


def chain(state):
    """The Linear layers layers.N of a state dict, one after another: both published heads have no activation between."""
    numbers = sorted({int(k.split('.')[1]) for k in state})
    shapes = [state[f'layers.{n}.weight'].shape for n in numbers]
    return assembled(lambda s: nn.Sequential(*(nn.Linear(i, o) for o, i in s)), shapes, {
        f'{numbers.index(int(k.split(".")[1]))}.{k.split(".")[2]}': v for k, v in state.items()})


BLIP = (            # BLIP's names of its vision tower, transformers' names
    ('cls_token', 'embeddings.class_embedding'), ('pos_embed', 'embeddings.position_embedding'),
    ('patch_embed.proj', 'embeddings.patch_embedding'), ('blocks.', 'encoder.layers.'), ('norm1', 'layer_norm1'),
    ('norm2', 'layer_norm2'), ('attn.qkv', 'self_attn.qkv'), ('attn.proj', 'self_attn.projection'),
    ('norm.', 'post_layernorm.'))


def blip_of(state):
    """BLIP's vision tower and its text encoder with cross-attention, of the sizes of a state dict in BLIP's names."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel
    vision, text = renamed(under(state, 'visual_encoder.'), BLIP), under(state, 'text_encoder.')
    _, positions, width = vision['embeddings.position_embedding'].shape
    patch = vision['embeddings.patch_embedding.weight'].shape[-1]
    words, hidden = text['embeddings.word_embeddings.weight'].shape
    vision_config = BlipVisionConfig(
        hidden_size=width, num_attention_heads=heads(width), num_hidden_layers=depth(vision, 'encoder.layers.'),
        intermediate_size=len(vision['encoder.layers.0.mlp.fc1.weight']), patch_size=patch,
        image_size=math.isqrt(positions - 1) * patch, layer_norm_eps=1e-6)
    text_config = BlipTextConfig(
        vocab_size=words, hidden_size=hidden, num_attention_heads=heads(hidden), encoder_hidden_size=width,
        num_hidden_layers=depth(text, 'encoder.layer.'), layer_norm_eps=1e-12,
        intermediate_size=len(text['encoder.layer.0.intermediate.dense.weight']),
        max_position_embeddings=len(text['embeddings.position_embeddings.weight']))
    return assembled(BlipVisionModel, vision_config, vision), \
        assembled(BlipTextModel, text_config, text, add_pooling_layer=False)


class ImageReward:
    """ImageReward (arXiv 2304.05977): a linear head on BLIP's first text token, which has looked at the picture."""
    home, unit = 'THUDM/ImageReward', 'standard deviations of its training pictures'
    mean, std, length = .16717362830052426, 1.0333394966054072, 35

    def __init__(self, source=home, device='cpu'):
        from transformers import BertTokenizer
        with loading(source, 'RE-N-Y/ImageReward'):
            state = read(source, 'ImageReward.pt', 'model.safetensors')
            self.vision, self.text = (frozen(net, device) for net in blip_of(under(state, 'blip.')))
            self.head = frozen(chain(under(state, 'mlp.')), device)
            # BLIP's two extra tokens are never in a prompt, so BERT's own tokenizer gives the same ids
            self.tokenizer = BertTokenizer.from_pretrained(beside(source, 'google-bert/bert-base-uncased'))
            self.truncated = 0

    def score(self, images, prompts):
        images = images.to(self.vision.device, self.vision.dtype)
        seen = self.vision(normal(fit(images, self.vision.config.image_size, round))).last_hidden_state   # (B, 197, 1024)
        text = tokenize(self, prompts, self.length).to(seen.device)
        answer = self.text(text['input_ids'], text['attention_mask'], encoder_hidden_states=seen).last_hidden_state
        return (self.head(answer[:, 0])[:, 0] - self.mean) / self.std


class Aesthetic:
    """LAION's aesthetic predictor: a linear head on the unit CLIP-L embedding of the picture; prompts do not matter."""
    home, unit, truncated = 'camenduru/improved-aesthetic-predictor', 'points from 1 to 10', 0

    def __init__(self, source=home, device='cpu', clip=CLIP_L):
        with loading(source, 'RE-N-Y/laion-aesthetic'):
            state = read(source, 'sac+logos+ava1-l14-linearMSE.pth', 'model.safetensors')
            self.head = frozen(chain(under(state, 'mlp.') or state), device)
        self.clip = Clip(clip, device)

    def score(self, images, prompts):
        return self.head(self.clip.embed_images(images))[:, 0]


# metric: its constructor (source, device), default source, column title, format
SCORES = {
    'clip': (Clip, Clip.home, 'CLIP score', '{:.2f}'),
    'pickscore': (PickScore, PickScore.home, 'PickScore', '{:.4f}'),
    'hpsv2': (functools.partial(HPSv2, version='hpsv2'), HPSv2.home, 'HPSv2.0', '{:.4f}'),
    'hpsv2.1': (functools.partial(HPSv2, version='hpsv2.1'), HPSv2.home, 'HPSv2.1', '{:.4f}'),
    'imagereward': (ImageReward, ImageReward.home, 'ImageReward', '{:.4f}'),
    'mps': (MPS, MPS.home, 'MPS', '{:.2f}'),
    'aesthetic': (Aesthetic, Aesthetic.home, 'Aesthetic', '{:.2f}'),
}

# ---------------------------------------------------------------------------------------------------------------------
# distances between sets of pictures


def kernel(a, b):
    """CMMD's Gaussian kernel of width 10 between unit vectors (N, D) and (M, D): (N, M) in float64."""
    return torch.exp(-torch.cdist(a.double(), b.double()).square() / 200)


def cmmd(x, y):
    """1000 x squared MMD of unit vectors x (N, D), y (M, D)."""
    return 1000 * (kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean()).item()


def r_precision(clip, vectors, index, prompts, near, seed):
    """For pictures with the unit vectors (N, D) and prompts prompts[i], i in index: 1. where the own prompt ranks first by
    `clip` among 32 texts, itself, up to 31 of near[i], and others of `prompts` chosen by (seed, i); else 0. (N,) float64."""
    different, choices = list(dict.fromkeys(prompts)), []
    for i in index:
        rest = [q for q in different if q != prompts[i] and q not in near[i][:31]]
        order = np.random.default_rng([seed, i]).permutation(len(rest))
        choices.append([prompts[i], *near[i][:31], *(rest[k] for k in order[:31 - len(near[i][:31])])])
    texts = sorted({text for choice in choices for text in choice})
    place = {text: k for k, text in enumerate(texts)}
    embedded = torch.cat([clip.embed_texts(texts[k:k + 256]).cpu() for k in range(0, len(texts), 256)])
    won = [(v @ embedded[[place[t] for t in choice]].T).argmax() == 0 for v, choice in zip(vectors, choices)]
    return torch.tensor(won).double()


def frechet(x, y):
    """|mu_x - mu_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)) of features x (N, D), y (M, D), in float64."""
    def root(features):
        values, vectors = torch.linalg.eigh(torch.cov(features.T))
        return vectors * values.clamp(min=0).sqrt()                                    # C = R R^T
    x, y = torch.as_tensor(x).double(), torch.as_tensor(y).double()
    r, s = root(x), root(y)
    # tr (C_x C_y)^(1/2) = the singular values of R_x^T R_y: real also with fewer pictures than features, unlike sqrtm
    trace = torch.linalg.svdvals(r.T @ s).sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + r.square().sum() + s.square().sum() - 2 * trace).item()


def fid(files, real_files, device='cpu', batch=64, workers=0):
    """Frechet distance of two lists of picture files by the Inception features and resizing of clean-fid (mode 'clean')."""
    try:
        import cleanfid.fid
    except ImportError as error:
        raise Unavailable('FID needs clean-fid: pip install clean-fid') from error
    try:
        network = cleanfid.fid.build_feature_extractor('clean', torch.device(device), use_dataparallel=False)
    except (OSError, RuntimeError) as error:
        raise Unavailable('the Inception weights of FID could not be downloaded or read; put inception-2015-12-05.pt of '
                          f'nvlabs-fi-cdn.nvidia.com into /tmp ({" ".join(str(error).split())[:160]})') from error
    return frechet(*(cleanfid.fid.get_files_features(
        [str(f) for f in part], network, num_workers=workers, batch_size=batch, device=torch.device(device), mode='clean',
        verbose=False) for part in (files, real_files)))
