"""
Pictures from a distilled student, or from its teacher for comparison, as one PNG or single ones.

    python sample.py --steps 4                       # the newest student, its own prompts
    python sample.py --prompt "a red fox in snow" --n 16
    python sample.py --teacher                       # the base model, same prompts and first noise
    python sample.py --out pictures/                 # single PNGs, for evaluate.py --images
    python sample.py --serve                         # a page in the browser, student beside teacher
No pictures, but the student for others:
    python sample.py --merge out/pipeline            # a LoRA student as a whole pipeline
    python sample.py --merge out/x.safetensors       # as one file for ComfyUI, A1111 (SDXL)
    python sample.py --push_to_hub OWNER/NAME        # its folder, uploaded
"""

import functools
import inspect
import re
import time
from pathlib import Path

import torch
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file
from torchvision.transforms.functional import to_pil_image

import model as m

p = m.parser(__doc__)
flag = p.add_argument
flag('--ckpt', default='',
     help='run or student pipeline; empty: newest of out/stage[12]*, else the shipped one')
flag('--steps', type=int, help="sampling steps; default: the student's own, or for --teacher those "
     'of its pipeline in diffusers, 50 for SDXL and 28 for SD3')
flag('--teacher', action='store_true', help="sample the student's base model instead")
flag('--cfg', type=float, help="the teacher's guidance; default: that of its distillation")
flag('--prompt', default='', help='prompt for all pictures')
flag('--prompts', default='', help='text file, one prompt per line')
flag('--n', type=int, default=16, help='pictures; prompts repeat in turn')
flag('--batch', type=int, default=8, help='pictures per call')
flag('--seed', type=int, default=0, help='picture i depends on (seed, i) alone')
flag('--compile', action='store_true', help='torch.compile: a slow first call, faster ones after')
flag('--out', default='samples.png', help='PNG of all to write; NAME/: a folder of single ones')
flag('--merge', default='', help='write the student, LoRA merged, as this pipeline folder instead; '
     'NAME.safetensors: as one file in the original layout of SDXL, float16')
flag('--push_to_hub', default='', help="upload the student's folder, or what --merge wrote, as "
     'this repository of the Hugging Face hub instead; private where it is new')
flag('--serve', action='store_true', help='a page on this machine to try prompts on; needs gradio')
flag('--port', type=int, default=7860, help='of that page, http://127.0.0.1:PORT')
args = p.parse_args()
m.at_least(args, n=1, batch=1, seed=0)
for name in 'merge', 'push_to_hub', 'serve':
    if getattr(args, name) and args.teacher:
        m.die(f'--{name} is for a student; leave --teacher away')
single, one_file = args.out.endswith('/'), args.merge.endswith('.safetensors')
place = Path(args.merge or args.out)
if args.merge and place.exists():
    m.die(f'--merge {place} exists; choose a new name')
if one_file and args.push_to_hub:
    m.die('--push_to_hub uploads a folder; give --merge the name of one, without .safetensors')
if place.is_dir() and not single:
    m.die(f'--out {place} is a folder; give the name of a PNG, or end it in / for single ones')
if single and any(place.glob('*')):
    m.die(f'--out {args.out} has files in it; choose a new folder')
if args.serve:
    with m.sentence('--serve needs gradio: pip install gradio', ImportError):
        import gradio
folder, facts = m.find_student(args.ckpt)
base = facts['base_model']
prompts = m.read_prompts(args.prompts) if args.prompts else facts['prompts']
prompts = [args.prompt or prompts[i % len(prompts)] for i in range(args.n)]
device = 'cuda' if torch.cuda.is_available() else 'cpu'

# --------------------------------------------------------------------------------------------------
# the student for others

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
    """{name: tensor} of an SDXL pipeline under the names of Stability's own file, float16: what
    diffusers' from_single_file undoes."""
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

# --------------------------------------------------------------------------------------------------
# the upload

if args.push_to_hub and not args.merge:
    print(f'{folder}: uploaded to {push(folder, args.push_to_hub)}')
    raise SystemExit
if not args.serve:
    m.writable_folder(place if single and not args.merge else place.parent,
                      '--merge' if args.merge else '--out')
if args.teacher:
    pipe = m.load_pipeline(base, "--teacher: the student's base model", t5=facts.get('t5'),
                           base_lora=facts.get('base_lora'))
else:
    pipe = m.load_student(folder, facts)
if args.merge:
    if facts.get('lora'):
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    family = m.family_of(pipe)
    facts |= dict(lora=None)
    if one_file and family is not m.SDXL:
        m.die(f'--merge {place}: one file is written of SDXL alone; give the name of a folder')
    with m.replacing(place) as tmp:
        if one_file:
            save_file(original(pipe), tmp, m.modelspec(facts, family))
        else:
            pipe.save_pretrained(tmp)
            m.write_facts(tmp, facts, family, folder.parent)
    print(f'{place}: {folder} as {"one file" if one_file else f"a whole pipeline, {pipe.dtype}"}')
    if args.push_to_hub:
        print(f'{place}: uploaded to {push(place, args.push_to_hub)}')
    raise SystemExit

# --------------------------------------------------------------------------------------------------
# pictures

# what the pipeline of the teacher draws with in diffusers, where nothing else is said
own = inspect.signature(type(pipe).__call__).parameters
if args.cfg is None:
    args.cfg = facts.get('cfg', own['guidance_scale'].default)
if args.steps is None:
    args.steps = own['num_inference_steps'].default if args.teacher else len(facts['steps'])
m.at_least(args, steps=1, cfg=0)
m.at_most(args, steps=1000)
guidance = args.cfg if args.teacher else 0
pipe.to(device).set_progress_bar_config(disable=True)
if args.compile:
    m.compile_pipeline(pipe)
if args.teacher:
    print(f'{base}, {args.steps} steps of {type(pipe.scheduler).__name__}, guidance {args.cfg}')
else:
    steps = m.Schedule(pipe.scheduler).steps(args.steps).long().tolist()
    kinds = {'its own steps': {*steps} == {*facts['steps']},
             'a subset of its steps': {*steps} < {*facts['steps']},
             'a finer grid than its steps': {*steps} > {*facts['steps']}}
    kind = next((words for words, fits in kinds.items() if fits), 'other steps than its own')
    print(f'{folder}, iteration {facts["iteration"]} on {base}, {kind}: {steps}')

def save(i, text, picture):
    """One PNG, with what made it written in as A1111 does, which evaluate.py --images reads."""
    height, width = picture.shape[-2:]
    info = PngInfo()
    info.add_text('parameters', (
        f'{text}\nSteps: {args.steps}, Sampler: {type(pipe.scheduler).__name__}, CFG scale: '
        f'{guidance}, Seed: {args.seed}, Picture: {i}, '
        f'Size: {width}x{height}, Model: {base if args.teacher else folder}'))
    with m.replacing(place / f'{i:05d}.png') as tmp:
        to_pil_image(picture).save(tmp, 'PNG', pnginfo=info)

@functools.cache
def teacher():
    """The student's teacher, loaded when it is asked for."""
    found = m.load_pipeline(base, "the student's base model", t5=facts.get('t5'),
                            base_lora=facts.get('base_lora'))
    found.set_progress_bar_config(disable=True)
    return found.to(device)

def tried(prompt, seed, steps, beside):
    """What the page shows: the student's picture, the teacher's or None, their seconds."""
    rows = [('student', pipe, int(steps), 0.)]
    if beside:
        rows.append(('teacher', teacher(), own['num_inference_steps'].default, args.cfg))
    images, words = [], []
    for label, net, count, cfg in rows:
        began = time.time()
        picture, = m.generate(net, [prompt], [0], int(seed), count, cfg)
        images.append(to_pil_image(picture))
        words.append(f'{label}: {count} steps, {time.time() - began:.2f} s')
    return images[0], images[1] if beside else None, ', '.join(words)

if args.serve:
    page = gradio.Interface(
        tried, title=f'{folder}, student of {base}', flagging_mode='never', api_name='draw',
        inputs=[gradio.Textbox(prompts[0], label='prompt'),
                gradio.Number(args.seed, label='seed', precision=0, minimum=0),
                gradio.Slider(1, max(8, args.steps), args.steps, step=1,
                              label='steps of the student'),
                gradio.Checkbox(False, label=f'beside it the teacher, guidance {args.cfg}')],
        outputs=[gradio.Image(label='student', format='png'),
                 gradio.Image(label='teacher', format='png'),
                 gradio.Textbox(label='seconds')])
    with m.sentence(f'--port {args.port} cannot be had; choose another', (OSError, OverflowError)):
        page.launch(server_name='127.0.0.1', server_port=args.port)
    raise SystemExit
pictures, clock = [], [time.time()]
for k in range(0, args.n, args.batch):
    index = range(args.n)[k:k + args.batch]
    texts = [prompts[i] for i in index]
    pictures.append(m.generate(pipe, texts, index, args.seed, args.steps, guidance))
    clock.append(time.time())
    for i, text, picture in zip(index, texts, pictures[-1]) if single else ():
        save(i, text, picture)
if not single:
    m.picture_grid([torch.cat(pictures) * 2 - 1], prompts, args.out)
count = len(pictures[0])
speed = f'{(clock[1] - clock[0]) / count:.3f} s per picture in the first call'
if args.n > count:
    speed += f', {(clock[-1] - clock[1]) / (args.n - count):.3f} s after it'
print(f'{args.out}: {args.n} pictures, {speed} ({device})')
