"""
Pictures from a distilled student, or from its teacher for comparison, as one PNG or single ones.

    python sample.py --steps 4                       # the newest student, its own prompts
    python sample.py --prompt "a red fox in snow" --n 16
    python sample.py --teacher --steps 50 --cfg 7    # the base model, same prompts and first noise
    python sample.py --out pictures/                 # single PNGs, for evaluate.py --images
    python sample.py --merge out/pipeline            # no pictures: a LoRA student as a pipeline
    python sample.py --merge out/x.safetensors       # or one file for ComfyUI, A1111 (SDXL)
    python sample.py --push_to_hub OWNER/NAME        # no pictures: the student's folder, uploaded
"""

import json
import time
from pathlib import Path

import torch
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file
from torchvision.transforms.functional import to_pil_image

import export
import model as m

p = m.parser(__doc__)
flag = p.add_argument
flag('--ckpt', default='', help='run or student; empty: newest of out/stage[12]*, else shipped')
flag('--teacher', action='store_true', help="draw with the student's base model instead")
flag('--steps', type=int, default=4, help='sampling steps')
flag('--cfg', type=float, default=7., help='guidance of the teacher; a student needs none')
flag('--prompt', default='', help='one prompt for all pictures; empty: --prompts')
flag('--prompts', default='', help="text file, one prompt per line; empty: the student's own")
flag('--n', type=int, default=16, help='pictures; prompts repeat in turn')
flag('--batch', type=int, default=8, help='pictures per call')
flag('--seed', type=int, default=0, help='picture i depends on (seed, i) alone')
flag('--compile', action='store_true', help='torch.compile: a slow first call, faster ones after')
flag('--out', default='samples.png', help='PNG of all to write; NAME/: a folder of single ones')
flag('--merge', default='', help='write the student, LoRA merged, as this pipeline folder instead; '
     'NAME.safetensors: as one file in the original layout of SDXL, float16')
flag('--push_to_hub', default='', help="upload the student's folder, or what --merge wrote, as "
     'this repository of the Hugging Face hub instead; private where it is new')
args = p.parse_args()
m.at_least(args, steps=1, n=1, batch=1, seed=0, cfg=0)
m.at_most(args, steps=1000)
for name in ('merge', 'push_to_hub'):
    if getattr(args, name) and args.teacher:
        m.die(f'--{name} is for a student; leave --teacher away')
if args.merge and Path(args.merge).exists():
    m.die(f'--merge {args.merge} exists; choose a new name')
single, one_file = args.out.endswith('/'), args.merge.endswith('.safetensors')
if one_file and args.push_to_hub:
    m.die('--push_to_hub uploads a folder; give --merge the name of one, without .safetensors')
if Path(args.out).is_dir() and not single:
    m.die(f'--out {args.out} is a folder; give the name of a PNG, or end it in / for single ones')
if single and any(Path(args.out).glob('*')):
    m.die(f'--out {args.out} has files in it; choose a new folder')
folder, facts = m.find_student(args.ckpt)
if args.push_to_hub and not args.merge:
    print(f'{folder}: uploaded to {export.push(folder, args.push_to_hub)}')
    raise SystemExit
place = Path(args.merge or args.out)
m.writable_folder(place if single and not args.merge else place.parent,
                  '--merge' if args.merge else '--out')
base = facts['base_model']
prompts = m.read_prompts(args.prompts) if args.prompts else facts['prompts']
prompts = [args.prompt or prompts[i % len(prompts)] for i in range(args.n)]
device, dtype = ('cuda', torch.float16) if torch.cuda.is_available() else ('cpu', torch.float32)
if args.teacher:
    pipe = m.load_pipeline(base, "--teacher: the student's base model", dtype, facts.get('t5'))
    print(f'{base}, {args.steps} steps of {type(pipe.scheduler).__name__}, guidance {args.cfg}')
else:
    pipe = m.load_student(folder, facts, dtype)
    steps = m.Schedule(pipe.scheduler).steps(args.steps).long().tolist()
    kinds = {'its own steps': {*steps} == {*facts['steps']},
             'a subset of its steps': {*steps} < {*facts['steps']},
             'a finer grid than its steps': {*steps} > {*facts['steps']}}
    kind = next((words for words, fits in kinds.items() if fits), 'other steps than its own')
    print(f'{folder}, iteration {facts["iteration"]} on {base}, {kind}: {steps}')
if args.merge:
    if facts.get('lora'):
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    part = 'unet' if hasattr(pipe, 'unet') else 'transformer'
    facts |= dict(lora=None)
    if one_file and part != 'unet':
        m.die(f'--merge {args.merge}: one file is written of SDXL alone; give the name of a folder')
    with m.replacing(args.merge) as tmp:
        if one_file:
            save_file(export.original(pipe), tmp, export.modelspec(facts, part))
        else:
            pipe.save_pretrained(tmp)
            export.write_card(tmp, facts, part, Path(folder).parent)
            (tmp / 'student.json').write_text(json.dumps(facts, indent=1))
    print(f'{args.merge}: {folder} as {"one file" if one_file else f"a whole pipeline, {dtype}"}')
    if args.push_to_hub:
        print(f'{args.merge}: uploaded to {export.push(args.merge, args.push_to_hub)}')
    raise SystemExit
pipe.to(device).set_progress_bar_config(disable=True)
if args.compile:
    m.compile_pipeline(pipe)

def save(i, text, picture):
    """One PNG, with what made it written in as A1111 does, which evaluate.py --images reads."""
    height, width = picture.shape[-2:]
    info = PngInfo()
    info.add_text('parameters', (
        f'{text}\nSteps: {args.steps}, Sampler: {type(pipe.scheduler).__name__}, CFG scale: '
        f'{args.cfg if args.teacher else 0}, Seed: {args.seed}, Picture: {i}, '
        f'Size: {width}x{height}, Model: {base if args.teacher else folder}'))
    with m.replacing(place / f'{i:05d}.png') as tmp:
        to_pil_image((picture.clamp(0, 1) * 255).round().byte()).save(tmp, 'PNG', pnginfo=info)

pictures, clock = [], [time.time()]
for k in range(0, args.n, args.batch):
    index = range(args.n)[k:k + args.batch]
    texts = [prompts[i] for i in index]
    pictures.append(m.generate(pipe, texts, index, args.seed, args.steps, args.cfg))
    clock.append(time.time())
    if single:
        for i, text, x in zip(index, texts, pictures[-1]):
            save(i, text, x)
if not single:
    m.picture_grid([torch.cat(pictures) * 2 - 1], prompts, args.out)
count = len(pictures[0])
speed = f'{(clock[1] - clock[0]) / count:.3f} s per picture in the first call'
if args.n > count:
    speed += f', {(clock[-1] - clock[1]) / (args.n - count):.3f} s after it'
print(f'{args.out}: {args.n} pictures, {speed} ({device})')
