"""
A student for others: names that ComfyUI and A1111 know, a model card, an upload.

    python sample.py --merge student.safetensors     # one file in SDXL's original layout
    python sample.py --push_to_hub OWNER/NAME        # the student's folder, private at first
"""

import functools
import importlib.metadata
import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import torch

import model as m

COMFYUI = 'comfyui.safetensors'

# base models whose licence is known, as model cards on the hub write it
STABILITY = ('other\nlicense_name: stabilityai-ai-community\n'
             'license_link: https://huggingface.co/{base}/blob/main/LICENSE.md')
LICENCES = {'stabilityai/stable-diffusion-xl-': 'openrail++',
            'stabilityai/stable-diffusion-3': STABILITY}

@functools.cache
def commit():
    """The commit of this repository, with a + where its pages were edited; '' outside of git."""
    try:
        git = ['git', '-C', str(Path(__file__).resolve().parent)]
        head, edits = (subprocess.run([*git, *words], capture_output=True, text=True, check=True,
                                      timeout=20).stdout.strip()
                       for words in (['rev-parse', 'HEAD'], ['status', '--porcelain', '*.py']))
    except (OSError, subprocess.SubprocessError):
        return ''
    return head + ('+' if edits else '')

def versions():
    """What a result depends on beside its settings: this commit and the libraries' versions."""
    names = 'torch', 'diffusers', 'transformers', 'peft'
    return dict(commit=commit(), versions={k: importlib.metadata.version(k) for k in names})

def modelspec(facts, part):
    """A safetensors file's metadata, by which other tools know what it is for."""
    kind = dict(unet='stable-diffusion-xl-v1-base', transformer='stable-diffusion-3')[part]
    words = {
        'sai_model_spec': '1.0.0', 'architecture': kind + ('/lora' if facts.get('lora') else ''),
        'implementation': 'diffusers', 'title': f'Flash-DMD student of {facts["base_model"]}',
        'description': f'{len(facts["steps"])} steps, no guidance (CFG 1), sampler LCM',
        'date': time.strftime('%Y-%m-%d')}
    return {'format': 'pt'} | {f'modelspec.{key}': value for key, value in words.items()}

def kohya(adapters):
    """{unet.X.lora_A.weight: tensor} under kohya's names, which ComfyUI and A1111 read."""
    from diffusers.utils import convert_state_dict_to_kohya
    return {k: w.contiguous() for k, w in convert_state_dict_to_kohya(adapters).items()}

def snippet(facts, part):
    """Lines of Python that draw with the student, started in its folder."""
    base, lora, steps = facts['base_model'], facts.get('lora'), len(facts['steps'])
    call, more, scheduler = f'num_inference_steps={steps}', '', 'LCMScheduler'
    if part == 'transformer':
        scheduler = 'FlowMatchLCMScheduler'
        call = f'sigmas={[k / steps for k in range(steps, 0, -1)]}'
        if facts.get('t5') is False:
            more = ', text_encoder_3=None, tokenizer_3=None'
            call += ', max_sequence_length=77'
    names = f'DiffusionPipeline, {scheduler}' if lora else 'DiffusionPipeline'
    lines = [
        'import torch', f'from diffusers import {names}',
        "student = '.'                                   # this folder, or its name on the hub",
        'cuda = torch.cuda.is_available()', 'dtype = torch.float16 if cuda else torch.float32',
        f'pipe = DiffusionPipeline.from_pretrained({repr(base) if lora else "student"}, '
        f'dtype=dtype{more})']
    if lora:
        lines.append('pipe.load_lora_weights(student)')
        lines.append(f"pipe.scheduler = {scheduler}.from_pretrained(student, "
                     "subfolder='scheduler')")
    lines.append("pipe.to('cuda' if cuda else 'cpu')")
    lines.append(f'prompt = {facts["prompts"][0]!r}')
    lines.append(f"pipe(prompt, {call}, guidance_scale=0).images[0].save('picture.png')")
    return lines

def write_card(folder, facts, part, run):
    """The model card of the student in `folder`, and beside it the newest pictures and the settings
    of its run, if `run` is the folder of one."""
    base, lora, steps = facts['base_model'], facts.get('lora'), len(facts['steps'])
    head = ['library_name: diffusers', 'pipeline_tag: text-to-image']
    licence = next((words.format(base=base) for name, words in LICENCES.items()
                    if base.startswith(name)), '')
    if licence:
        head.append(f'license: {licence}')
    if m.hub_id(base) and not Path(base).exists():
        head.append(f'base_model: {base}')
        head.append(f'base_model_relation: {"adapter" if lora else "finetune"}')
    tags = ['text-to-image', 'distillation'] + (['lora'] if lora else [])
    head.append(f'tags: [{", ".join(tags)}]')
    times = ', '.join(map(str, facts['steps']))
    text = ['---', *head, '---', '', f'# {steps}-step student of {base}', '',
            f'Distilled by Flash-DMD, in the open: recipe {facts["recipe"]}, iteration '
            f'{facts["iteration"]}. It draws in {steps} steps, at t = {times}, without guidance.']
    grids = sorted(run.glob('samples-*.png'))
    if grids:
        shutil.copyfile(grids[-1], folder / 'samples.png')
        text += ['', '![pictures of the run](samples.png)']
    text += ['', '```python', *snippet(facts, part), '```']
    if lora and part == 'unet':
        text += ['', f'ComfyUI, A1111: `{COMFYUI}` is the LoRA under their names, for strength 1; '
                 f'sampler LCM, scheduler simple, {steps} steps, CFG 1.']
    text += ['', "Licence: the base model's" + (
        '.' if licence else ', which is not known here; add it before you publish.')]
    if commit():
        text += ['', f'Written by commit {commit()}.']
    if (run / 'args.json').exists():
        settings = json.loads((run / 'args.json').read_text())
        # where things lie on this machine is nobody's business
        settings = {k: v for k, v in settings.items() if not str(v).startswith(('/', '~'))}
        text += ['', 'Settings of the run:', '', '```json', json.dumps(settings, indent=1), '```']
    (folder / 'README.md').write_text('\n'.join(text) + '\n')

# --------------------------------------------------------------------------------------------------
# SDXL's original layout, the inverse of what diffusers' from_single_file undoes

RESNET = dict(norm1='in_layers.0', conv1='in_layers.2', norm2='out_layers.0', conv2='out_layers.3',
              time_emb_proj='emb_layers.1', conv_shortcut='skip_connection')
ENDS = dict(zip(
    ('time_embedding.linear_1', 'time_embedding.linear_2', 'add_embedding.linear_1',
     'add_embedding.linear_2', 'conv_in', 'conv_norm_out', 'conv_out'),
    ('time_embed.0', 'time_embed.2', 'label_emb.0.0', 'label_emb.0.2', 'input_blocks.0.0', 'out.0',
     'out.2')))
OPEN_CLIP = {
    'encoder.layers.': 'transformer.resblocks.', 'layer_norm1': 'ln_1', 'layer_norm2': 'ln_2',
    'mlp.fc1': 'mlp.c_fc', 'mlp.fc2': 'mlp.c_proj', 'self_attn.out_proj': 'attn.out_proj',
    'embeddings.position_embedding.weight': 'positional_embedding',
    'embeddings.token_embedding': 'token_embedding', 'final_layer_norm': 'ln_final'}

def unet_name(k, layers, attends):
    """A UNet's key; layers: ResNets of a block down, attends: whether each block up has attention
    (its upsampler comes behind that)."""
    at = re.fullmatch(r'(down|up|mid)_block(?:s\.(\d))?\.(\w+)\.(\d)\.(.+)', k)
    if at is None:
        name, _, kind = k.rpartition('.')
        return f'{ENDS[name]}.{kind}'
    where, i, what, j, rest = at.groups()
    i, j = int(i or 0), int(j)
    if what == 'resnets':
        layer, _, kind = rest.partition('.')
        rest = f'{RESNET[layer]}.{kind}'
    if where == 'mid':
        return f'middle_block.{1 if what == "attentions" else 2 * j}.{rest}'
    if what == 'downsamplers':
        return f'input_blocks.{(i + 1) * (layers + 1)}.0.{rest.replace("conv", "op")}'
    if what == 'upsamplers':
        return f'output_blocks.{i * (layers + 1) + layers}.{1 + attends[i]}.{rest}'
    block = i * (layers + 1) + j
    block = f'input_blocks.{block + 1}' if where == 'down' else f'output_blocks.{block}'
    return f'{block}.{1 if what == "attentions" else 0}.{rest}'

def vae_name(k, levels):
    """A VAE's key; levels: how many sizes it has. Blocks up are counted from the finest."""
    k = re.sub(r'down_blocks\.(\d)\.resnets', r'down.\1.block', k)
    k = re.sub(r'up_blocks\.(\d)\.resnets', lambda a: f'up.{levels - 1 - int(a[1])}.block', k)
    k = re.sub(r'down_blocks\.(\d)\.downsamplers\.0', r'down.\1.downsample', k)
    k = re.sub(r'up_blocks\.(\d)\.upsamplers\.0',
               lambda a: f'up.{levels - 1 - int(a[1])}.upsample', k)
    k = re.sub(r'mid_block\.resnets\.(\d)', lambda a: f'mid.block_{int(a[1]) + 1}', k)
    if 'mid_block.attentions.0' in k:
        k = k.replace('mid_block.attentions.0', 'mid.attn_1').replace('group_norm', 'norm')
        k = k.replace('to_out.0', 'proj_out').replace('to_', '')
    return k.replace('conv_norm_out', 'norm_out').replace('conv_shortcut', 'nin_shortcut')

def original(pipe):
    """{name: tensor} of an SDXL pipeline in the layout of Stability's own file, float16."""
    found = {}
    config = pipe.unet.config
    attends = ['Attn' in kind for kind in config.up_block_types]
    for k, w in pipe.unet.state_dict().items():
        name = unet_name(k, config.layers_per_block, attends)
        found[f'model.diffusion_model.{name}'] = w
    for k, w in pipe.vae.state_dict().items():
        name = vae_name(k, len(pipe.vae.config.block_out_channels))
        # attention was a 1x1 convolution
        w = w[:, :, None, None] if 'attn_1' in name and w.ndim == 2 else w
        found[f'first_stage_model.{name}'] = w
    for k, w in pipe.text_encoder.state_dict().items():
        k = k.removeprefix('text_model.')
        found[f'conditioner.embedders.0.transformer.text_model.{k}'] = w
    second = {k.removeprefix('text_model.'): w for k, w in pipe.text_encoder_2.state_dict().items()}
    for k, w in second.items():
        if 'k_proj' in k or 'v_proj' in k:
            continue
        if 'q_proj' in k:                                      # one matrix for all three
            w = torch.cat([second[k.replace('q_proj', f'{x}_proj')] for x in 'qkv'])
            k = k.replace('self_attn.q_proj.', 'attn.in_proj_')
        if k == 'text_projection.weight':
            k, w = 'text_projection', w.T
        for old, new in OPEN_CLIP.items():
            k = k.replace(old, new)
        found[f'conditioner.embedders.1.model.{k}'] = w
    settings = pipe.scheduler.config
    if settings.prediction_type == 'v_prediction':       # marks by which loaders know such a model
        found['v_pred'] = torch.zeros(1)
        if settings.get('rescale_betas_zero_snr'):
            found['ztsnr'] = torch.zeros(1)
    return {k: w.half().contiguous() if w.is_floating_point() else w for k, w in found.items()}

def push(folder, name):
    """Uploads a folder as the hub's repository `name`, private where it is new; returns its
    address. A sentence where that fails."""
    from huggingface_hub import HfApi
    try:
        api = HfApi()
        url = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:                     # the network, the hub, a token, a name: any may
        reason = ' '.join(str(error).split())[:200]
        m.die(f'--push_to_hub {name}: {folder} was not uploaded whole ({reason}); see to the '
              'network and `hf auth login` with a token that may write, then run again')
    return url
