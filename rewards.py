"""
Pixel-space rewards and metrics: one class per published model, on transformers' networks.

    reward = PickScore()              # a hub id, a folder or a file; Unavailable says what is wrong
    reward.score(images, prompts)     # (B, 3, H, W) in [0, 1], any H and W, B strings -> (B,) fp32

Scores carry gradients to the images. Weights are float32 and frozen; no checkpoint is unpickled.
"""

import functools
import html
import math
from pathlib import Path

import ftfy
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torchvision.transforms import functional as T

from model import BAD_FILE, die, read_prompts

CLIP_L, CLIP_H = 'openai/clip-vit-large-patch14', 'laion/CLIP-ViT-H-14-laion2B-s32B-b79K'
MEAN, STD = (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711)      # of all below

# --------------------------------------------------------------------------------------------------
# what the models have in common: checkpoints, sizes, pictures

class Unavailable(Exception):
    """A model or library that cannot be had here; the message is one sentence with the way out."""

class Reward(nn.Module):
    """A published model, or a formula: `score` alone. `home` is its default source, `safe` a copy
    in safetensors, `truncated` how many scored prompts were longer than its text encoder."""
    home = safe = ''
    truncated = 0

    def load(self, source):
        """Builds it from a source."""

    def __init__(self, source=None, device='cpu', **more):
        super().__init__()
        source = source or self.home
        try:
            self.load(source, **more)
        except BAD_FILE as error:
            raise Unavailable(
                f'{source} could not be found, downloaded or read as this model (pickled code is '
                f'never run); give a whole copy, best in safetensors as {self.safe} is '
                f'({" ".join(str(error).split())[:125]})') from error
        self.to(device)

    def tokens(self, texts):
        """Token ids and mask (B, length), padded and cut to it; texts that are cut are counted."""
        whole = self.tokenizer(texts, verbose=False)['input_ids']
        self.truncated += sum(len(text) > self.length for text in whole)
        ids = self.tokenizer(texts, padding='max_length', truncation=True, return_tensors='pt',
                             max_length=self.length)
        return ids.to(next(self.parameters()).device)

def read(source, *names):
    """The state dict in a file, or in the first of `names` that a folder or hub id has."""
    path = Path(source)
    if not path.is_file():
        found = (transformers.utils.cached_file(
            source, k, _raise_exceptions_for_missing_entries=k == names[-1]) for k in names)
        path = next(filter(None, found))
    if str(path).endswith('.safetensors'):
        return load_file(path)
    state = torch.load(path, map_location='cpu', weights_only=True)
    return state.get('state_dict', state)

def beside(source, default):
    """Where the tokenizer of `source` is: in its own folder if one is there, else in `default`."""
    folder = Path(source).parent if Path(source).is_file() else Path(source)
    names = 'tokenizer.json', 'vocab.json', 'vocab.txt'
    return str(folder) if any((folder / name).exists() for name in names) else default

def under(state, prefix):
    """The entries of a state dict under a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

def renamed(state, names):
    """A state dict with each {old: new} of names replaced in its keys, in order."""
    for old, new in names.items():
        state = {k.replace(old, new): v for k, v in state.items()}
    return state

def assembled(state, network, *args, **kwargs):
    """network(*args, **kwargs) with exactly the tensors of `state`, frozen in float32."""
    with torch.device('meta'):                               # initial weights would take a minute
        net = network(*args, **kwargs)
    # 0, 1, ...: old files have them, new networks do not save them
    state = {k: v for k, v in state.items() if not k.endswith('position_ids')}
    net.load_state_dict(state, assign=True)
    for layer in net.modules():
        if hasattr(layer, 'position_ids'):
            layer.position_ids = torch.arange(layer.position_ids.shape[-1])[None]
    return net.float().eval().requires_grad_(False)

def tower(state, layers='encoder.layers.', widest='mlp.fc1'):
    """The sizes of a transformer, in the words of transformers' configs."""
    inner, width = state[f'{layers}0.{widest}.weight'].shape
    # no tensor's shape tells the heads: 64 channels each, but 80 in the vision tower of ViT-H
    return dict(hidden_size=width, intermediate_size=inner,
                num_attention_heads=16 if width == 1280 else width // 64,
                num_hidden_layers=len({k.split('.')[0] for k in under(state, layers)}))

def vision_tower(state):
    """tower, and the sizes of a picture and of its patches."""
    patch = state['embeddings.patch_embedding.weight'].shape[-1]
    positions = next(v for k, v in state.items() if 'position_embedding' in k).shape[-2]
    return tower(state) | dict(patch_size=patch, image_size=math.isqrt(positions - 1) * patch)

def fit(images, size, half=int):
    """(B, 3, H, W) -> (B, 3, size, size): shorter side to size, bicubic, clamped as PIL's, centre
    crop. half rounds half a pixel of offset: int as in transformers, round as in torchvision."""
    x = T.resize(images, size, T.InterpolationMode.BICUBIC).clamp(0, 1)
    h, w = x.shape[-2:]
    top, left = half((h - size) / 2), half((w - size) / 2)
    return x[..., top:top + size, left:left + size]

def letterbox(images, size):
    """(B, 3, H, W) -> (B, 3, size, size): longer side to size, black around; it may overshoot."""
    long = max(images.shape[-2:])
    sides = [round(side * size / long) for side in images.shape[-2:]]
    return T.center_crop(T.resize(images, sides, T.InterpolationMode.BICUBIC), size)

def normal(images, mean=MEAN, std=STD):
    return (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]

# --------------------------------------------------------------------------------------------------
# the models

class Clip(Reward):
    """CLIP score: 100 x cosine of picture and prompt (2104.08718, without factor 2.5 and cut)."""
    home = safe = CLIP_L
    tokenizer_of = ''                        # where no tokenizer is beside the weights; '': theirs
    mean, std, scale, resize = MEAN, STD, 100, staticmethod(fit)

    def load(self, source):
        state = read(source, 'model.safetensors', 'pytorch_model.bin')
        config = transformers.CLIPConfig.from_pretrained(source)
        self.keep(assembled(state, transformers.CLIPModel, config), source)
        images = transformers.CLIPImageProcessor.from_pretrained(self.folder)
        self.mean, self.std = images.image_mean, images.image_std
        sizes = {images.size['shortest_edge'], images.crop_size['height']}
        assert sizes == {self.size}, f'its pictures are not cropped to {self.size} at the centre'

    def keep(self, clip, source):
        self.clip = clip
        self.size = clip.config.vision_config.image_size
        self.length = clip.config.text_config.max_position_embeddings
        self.folder = beside(source, self.tokenizer_of or source)
        self.tokenizer = transformers.CLIPTokenizer.from_pretrained(self.folder)

    def pixels(self, images):
        """(B, 3, H, W) in [0, 1] -> the network's input (B, 3, size, size)."""
        images = images.to(self.clip.device, self.clip.dtype)
        return normal(self.resize(images, self.size), self.mean, self.std)

    def embed_images(self, images):
        """(B, 3, H, W) in [0, 1] -> unit vectors (B, D), differentiable."""
        pooled = self.clip.vision_model(self.pixels(images)).pooler_output
        return F.normalize(self.clip.visual_projection(pooled), dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts):
        """B strings -> unit vectors (B, D)."""
        # no mask is needed: attention is causal and padding comes last
        pooled = self.clip.text_model(self.tokens(texts)['input_ids']).pooler_output
        return F.normalize(self.clip.text_projection(pooled), dim=-1)

    def score(self, images, prompts):
        v = self.embed_images(images)
        self.seen = v.detach()                                         # for R-precision and CMMD
        return self.scale * (v * self.embed_texts(prompts)).sum(-1)

class PickScore(Clip):
    """Cosine of a CLIP-H tuned on choices of Pick-a-Pic (arXiv 2305.01569)."""
    home = safe = 'yuvalkirstain/PickScore_v1'
    tokenizer_of, scale = CLIP_H, 1

def clip_of(state):
    """A CLIPModel of the sizes of a state dict in transformers' names, with open_clip's GELU."""
    text, vision = under(state, 'text_model.'), under(state, 'vision_model.')
    text_config = tower(text) | dict(
        hidden_act='gelu', eos_token_id=2,                    # 2: text is pooled at the greatest id
        vocab_size=len(text['embeddings.token_embedding.weight']),
        max_position_embeddings=len(text['embeddings.position_embedding.weight']))
    config = transformers.CLIPConfig(
        projection_dim=len(state['text_projection.weight']), text_config=text_config,
        vision_config=vision_tower(vision) | dict(hidden_act='gelu'))
    return assembled(state, transformers.CLIPModel, config)

OPEN_CLIP = {                                                    # open_clip's names, transformers'
    'visual.transformer.resblocks': 'vision_model.encoder.layers',
    'transformer.resblocks': 'text_model.encoder.layers',
    'visual.conv1': 'vision_model.embeddings.patch_embedding',
    'visual.class_embedding': 'vision_model.embeddings.class_embedding',
    'visual.positional_embedding': 'vision_model.embeddings.position_embedding.weight',
    'visual.ln_pre': 'vision_model.pre_layrnorm', 'visual.ln_post': 'vision_model.post_layernorm',
    'visual.proj': 'visual_projection', 'ln_final': 'text_model.final_layer_norm',
    'token_embedding': 'text_model.embeddings.token_embedding',
    'positional_embedding': 'text_model.embeddings.position_embedding.weight',
    'attn.out_proj': 'self_attn.out_proj', 'ln_1': 'layer_norm1', 'ln_2': 'layer_norm2',
    'mlp.c_fc': 'mlp.fc1', 'mlp.c_proj': 'mlp.fc2'}

def from_open_clip(state):
    """open_clip's state dict in transformers' names: q, k, v apart, projections transposed."""
    out = {}
    for key, value in renamed(state, OPEN_CLIP).items():
        if 'attn.in_proj_' in key:
            for name, third in zip('qkv', value.chunk(3)):
                out[key.replace('attn.in_proj_', f'self_attn.{name}_proj.')] = third
        elif key in ('visual_projection', 'text_projection'):
            out[f'{key}.weight'] = value.T.contiguous()
        else:
            out[key] = value
    return out

class HPSv2(Clip):
    """Cosine of a CLIP-H tuned on choices of HPD v2 (arXiv 2306.09341), version 2.1."""
    home, safe = 'xswu/HPSv2', 'RE-N-Y/hpsv21 (v2.1)'
    files = ('HPS_v2.1_compressed.pt', 'model.safetensors')          # the second is that of `safe`
    tokenizer_of, scale, resize = CLIP_H, 1, staticmethod(letterbox)

    def load(self, source):
        state = read(source, *self.files)
        self.keep(clip_of(from_open_clip(under(state, 'model.') or state)), source)

    def tokens(self, texts):
        # open_clip's tokenizer, with which it was trained, mends texts; transformers' does not
        return super().tokens([html.unescape(html.unescape(ftfy.fix_text(x))) for x in texts])

class HPSv20(HPSv2):
    """Version 2.0, whose numbers are not comparable with those of 2.1."""
    files = ('HPS_v2_compressed.pt',)

class ParallelBlock(nn.Module):
    """x + attention(x) + SwiGLU(x) from one norm, one key and value for all heads (2204.02311)."""

    def __init__(self, dim, *sizes):
        super().__init__()
        self.sizes = sizes                        # channels of queries, of key and value, of SwiGLU
        self.norm = nn.LayerNorm(dim)
        self.fused = nn.Linear(dim, sum(sizes), bias=False)
        self.to_out = nn.Linear(sizes[0], dim, bias=False)
        self.ff_out = nn.Linear(sizes[2] // 2, dim, bias=False)

    def forward(self, x, context=None, mask=None):
        """x (B, N, D) looks at context (B, M, D) where mask (B, 1, 1, M), or without at itself."""
        q, kv, ff = self.fused(self.norm(x)).split(self.sizes, -1)
        if context is not None:
            kv = F.linear(context, self.fused.weight.split(self.sizes)[1])
        k, v = kv[:, None].chunk(2, -1)                                            # (B, 1, M, head)
        q = q.unflatten(-1, (-1, k.shape[-1])).transpose(1, 2)                 # (B, heads, N, head)
        if context is None:
            q, k = rotated(q), rotated(k)
        k, v = (y.expand(-1, q.shape[1], -1, -1) for y in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        value, gate = ff.chunk(2, -1)
        return x + self.to_out(out.transpose(1, 2).flatten(2)) + self.ff_out(F.silu(gate) * value)

def rotated(x):
    """Rotary positions 0..N-1 on x (..., N, C): c and c + C/2 turn by n / 10000^(2c/C)."""
    n, c = x.shape[-2:]
    angle = torch.arange(n).to(x)[:, None] / 10_000 ** (torch.arange(0, c, 2).to(x) / c)  # (N, C/2)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

def pairs(n, *sizes):
    """n pairs of blocks: one that looks at the prompt, one at the picture itself."""
    return nn.ModuleList(nn.ModuleList(ParallelBlock(*sizes) for _ in range(2)) for _ in range(n))

CROSS = {'.fn.': '.', 'fused_attn_ff_proj': 'fused', 'attn_out': 'to_out', 'ff_out.1': 'ff_out',
         'ff.2': 'ff_out'}                                       # MPS's names, ParallelBlock's

def cross_of(state):
    """MPS's cross model from its state dict."""
    state = {k: v for k, v in state.items() if not k.endswith('inv_freq')}        # rotary constants
    state = renamed(under(state, 'layers.'), CROSS)
    first = [k for k in state if k.endswith('to_q.weight')]
    for key in first:
        fused = [state.pop(key.replace('to_q', name)) for name in ('to_q', 'to_kv', 'ff.0')]
        state[key.replace('to_q', 'fused')] = torch.cat(fused)
    sizes = [fused[0].shape[1], *map(len, fused)]
    return assembled(state, pairs, len(first), *sizes)

class MPS(Clip):
    """Overall score of arXiv 2405.14705: exp(logit_scale) x cosine of a CLIP-H whose picture tokens
    attend to those of the prompt whose likeness to `condition` is above `threshold` of the prompt's
    greatest: .3 in the published evaluations, .01 in the model's own forward pass."""
    home = safe = 'RE-N-Y/mpsv1'
    tokenizer_of, threshold = CLIP_H, .3
    condition = ('light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, '
                 'hands, limbs, structure, instance, texture, quantity, attributes, position, '
                 'number, location, word, things.')

    def load(self, source):
        state = read(source, 'model.safetensors')
        state = under(state, 'mps.') or state
        self.keep(clip_of(under(state, 'model.')), source)
        self.cross = cross_of(under(state, 'cross_model.'))
        self.wanted = self.read_texts([self.condition])[0][0]                               # (T, D)

    @torch.no_grad()
    def read_texts(self, texts):
        """B strings -> projected tokens (B, T, D), padding too, and the pooled one (B, D)."""
        out = self.clip.text_model(self.tokens(texts)['input_ids'])
        return [self.clip.text_projection(x) for x in (out.last_hidden_state, out.pooler_output)]

    def score(self, images, prompts):
        words, prompt = self.read_texts(prompts)
        near = (words @ self.wanted.T.to(words)).amax(-1)                                   # (B, T)
        # the reference takes the maximum over batch mates too
        mask = near / near.amax(-1, keepdim=True) > self.threshold
        x = self.clip.vision_model(self.pixels(images)).last_hidden_state
        x = self.clip.visual_projection(x)                                             # (B, 257, D)
        for look, think in self.cross:
            x = think(look(x, words, mask[:, None, None]))
        return self.clip.logit_scale.exp() * F.cosine_similarity(x[:, 0], prompt)

def chain(state):
    """The Linear layers layers.N of a state dict in turn: the heads have no activation between."""
    layers = nn.Sequential()
    for n in sorted({int(k.split('.')[1]) for k in state}):
        weights = under(state, f'layers.{n}.')
        out, inp = weights['weight'].shape
        layers.append(assembled(weights, nn.Linear, inp, out))
    return layers

BLIP = {'cls_token': 'embeddings.class_embedding', 'pos_embed': 'embeddings.position_embedding',
        'patch_embed.proj': 'embeddings.patch_embedding', 'blocks.': 'encoder.layers.',
        'norm1': 'layer_norm1', 'norm2': 'layer_norm2', 'norm.': 'post_layernorm.',
        'attn.qkv': 'self_attn.qkv', 'attn.proj': 'self_attn.projection'}

def blip_of(state):
    """BLIP's vision tower and its text encoder with cross-attention, from BLIP's state dict."""
    vision, text = renamed(under(state, 'visual_encoder.'), BLIP), under(state, 'text_encoder.')
    vision_config = transformers.BlipVisionConfig(**vision_tower(vision), layer_norm_eps=1e-6)
    text_config = transformers.BlipTextConfig(
        **tower(text, 'encoder.layer.', 'intermediate.dense'), layer_norm_eps=1e-12,
        encoder_hidden_size=vision_config.hidden_size,
        vocab_size=len(text['embeddings.word_embeddings.weight']),
        max_position_embeddings=len(text['embeddings.position_embeddings.weight']))
    return (assembled(vision, transformers.BlipVisionModel, vision_config),
            assembled(text, transformers.BlipTextModel, text_config, add_pooling_layer=False))

class ImageReward(Reward):
    """ImageReward (arXiv 2304.05977), standardised: a linear head on BLIP's first text token."""
    home, safe = 'THUDM/ImageReward', 'RE-N-Y/ImageReward'
    mean, std, length = .16717362830052426, 1.0333394966054072, 35

    def load(self, source):
        state = read(source, 'ImageReward.pt', 'model.safetensors')
        self.vision, self.text = blip_of(under(state, 'blip.'))
        self.head = chain(under(state, 'mlp.'))
        # BLIP's two extra tokens are never in a prompt, so BERT's own tokenizer gives the same ids
        folder = beside(source, 'google-bert/bert-base-uncased')
        self.tokenizer = transformers.BertTokenizer.from_pretrained(folder)

    def score(self, images, prompts):
        x = fit(images.to(self.head[0].weight), self.vision.config.image_size, round)
        seen = self.vision(normal(x)).last_hidden_state                             # (B, 197, 1024)
        text = self.tokens(prompts)
        answer = self.text(text['input_ids'], text['attention_mask'], encoder_hidden_states=seen)
        return (self.head(answer.last_hidden_state[:, 0])[:, 0] - self.mean) / self.std

class Aesthetic(Reward):
    """LAION's aesthetic predictor, points from 1 to 10: a linear head on CLIP-L's unit vector."""
    home, safe = 'camenduru/improved-aesthetic-predictor', 'RE-N-Y/laion-aesthetic'

    def load(self, source, clip=CLIP_L):
        state = read(source, 'sac+logos+ava1-l14-linearMSE.pth', 'model.safetensors')
        self.head = chain(under(state, 'mlp.') or state)
        self.clip = Clip(clip)
        self.clip.resize = functools.partial(fit, half=round)       # OpenAI's crop, as LAION's

    def score(self, images, prompts):
        return self.head(self.clip.embed_images(images))[:, 0]

# metric: its class, default source, column title, format
SCORES = {
    'clip': (Clip, Clip.home, 'CLIP score', '{:.2f}'),
    'pickscore': (PickScore, PickScore.home, 'PickScore', '{:.4f}'),
    'hpsv2': (HPSv20, HPSv20.home, 'HPSv2.0', '{:.4f}'),
    'hpsv2.1': (HPSv2, HPSv2.home, 'HPSv2.1', '{:.4f}'),
    'imagereward': (ImageReward, ImageReward.home, 'ImageReward', '{:.4f}'),
    'mps': (MPS, MPS.home, 'MPS', '{:.2f}'),
    'aesthetic': (Aesthetic, Aesthetic.home, 'Aesthetic', '{:.2f}')}

# --------------------------------------------------------------------------------------------------
# distances between sets of pictures

def sharpness(images):
    """(B,): the standard deviation of the grey pictures' Laplacian, in 1/255. Noise raises it."""
    kernel = images.new_tensor([[0., 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    return F.conv2d(255 * images.mean(1, keepdim=True), kernel).std((1, 2, 3))

BANDS = 1, 3, 6, 10, 15, 21, 32                                             # cycles per 64 pixels

def log_spectrum(images):
    """The log of the mean energy in each band of BANDS, (B, 6): of white noise of variance v the
    log of v. Grey pictures (B, 3, H, W) without their mean, under a Hann window."""
    grey = images.mean(1)
    height, width = grey.shape[1:]
    window = torch.outer(*(torch.hann_window(k, device=grey.device) for k in (height, width)))
    energy = torch.fft.fft2((grey - grey.mean((1, 2), keepdim=True)) * window).abs().square()
    energy = energy / window.square().sum()
    rows, columns = (torch.fft.fftfreq(k, device=grey.device) for k in (height, width))
    cycles = 64 * torch.hypot(rows[:, None], columns)
    bands = [energy[:, (cycles >= low) & (cycles < high)] for low, high in zip(BANDS, BANDS[1:])]
    return torch.stack([band.mean(1) for band in bands], 1).clamp(min=1e-12).log()

def kernel(a, b):
    """CMMD's Gaussian kernel of width 10 between unit vectors (N, D) and (M, D): (N, M) float64."""
    return torch.exp(-torch.cdist(a.double(), b.double()).square() / 200)

def cmmd(x, y):
    """1000 x squared MMD of unit vectors x (N, D), y (M, D)."""
    return 1000 * (kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean()).item()

def near_prompts(file, n, blank=False):
    """The lines of FILE.hard.txt beside a prompt file FILE.txt, a list of near texts for each of
    its n prompts, read alike (blank); empty lists where there is no such file."""
    file = Path(file).with_suffix('.hard.txt')
    if not file.exists():
        return [[]] * n
    near = [line.split('\t') for line in read_prompts(file, blank=blank)]
    if len(near) != n:
        die(f'{file} has {len(near)} lines, not one for each of the {n} prompts')
    return near

def margins(clip, vectors, index, prompts, near, seed):
    """(N,) float64: by how many points of CLIP score the picture with unit vector vectors[k] is
    nearer to its prompt prompts[index[k]] than to the nearest of 31 other texts: up to 31 of
    near[i], others of `prompts` chosen by (seed, i). R-precision: the share not below 0."""
    different = dict.fromkeys(filter(None, prompts))
    choices = []
    for i in index:
        choice = [prompts[i], *near[i][:31]]
        rest = [text for text in different if text not in choice]
        order = np.random.default_rng([seed, i]).permutation(len(rest))
        choices.append(choice + [rest[k] for k in order[:32 - len(choice)]])
    texts = sorted(set().union(*choices))
    embedded = [clip.embed_texts(texts[k:k + 256]).cpu() for k in range(0, len(texts), 256)]
    embedded = dict(zip(texts, torch.cat(embedded)))
    found = []
    for vector, choice in zip(vectors, choices):
        likeness = vector @ torch.stack([embedded[text] for text in choice]).T
        # without others the prompt is the nearest
        found.append(likeness[0] - likeness[1:].max() if len(choice) > 1 else likeness[0] * 0)
    return 100 * torch.stack(found).double()

def frechet(x, y):
    """|mu_x - mu_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)) of features (N, D), (M, D) in float64."""
    def root(features):                                                                  # C = R R^T
        values, vectors = torch.linalg.eigh(torch.cov(features.T))
        return vectors * values.clamp(min=0).sqrt()
    x, y = torch.as_tensor(x).double(), torch.as_tensor(y).double()
    r, s = root(x), root(y)
    # tr (C_x C_y)^(1/2): real also with fewer pictures than features, unlike sqrtm
    trace = torch.linalg.svdvals(r.T @ s).sum()
    apart = (x.mean(0) - y.mean(0)).square().sum()
    return (apart + r.square().sum() + s.square().sum() - 2 * trace).item()

def fid(files, real_files, device='cpu', batch=64, workers=0):
    """Frechet distance of two lists of picture files by clean-fid's Inception and its resizing."""
    try:
        import cleanfid.fid
        network = cleanfid.fid.build_feature_extractor('clean', device, use_dataparallel=False)
    except (ImportError, OSError, RuntimeError) as error:
        raise Unavailable(
            'FID needs clean-fid (pip install clean-fid) and its Inception weights (downloaded, or '
            'inception-2015-12-05.pt of nvlabs-fi-cdn.nvidia.com put into /tmp): '
            + ' '.join(str(error).split())[:160]) from error
    features = [cleanfid.fid.get_files_features(
        [str(file) for file in side], network, num_workers=workers, batch_size=batch, device=device,
        mode='clean', verbose=False) for side in (files, real_files)]
    return frechet(*features)
