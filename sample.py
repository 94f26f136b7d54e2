"""
Pictures from a distilled student, or from its teacher for comparison, as one PNG.

    python sample.py --steps 4                       # the newest student, its own prompts
    python sample.py --prompt "a red fox in snow" --n 16
    python sample.py --teacher --steps 50 --cfg 7    # the base model, same prompts and first noise
    python sample.py --merge out/pipeline            # no pictures: a LoRA student as a pipeline
"""

import json
import time
from pathlib import Path

import torch

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
flag('--out', default='samples.png', help='PNG to write')
flag('--merge', default='', help='write the student, LoRA merged, as this pipeline folder instead')
args = p.parse_args()
m.at_least(args, steps=1, n=1, batch=1, seed=0, cfg=0)
m.at_most(args, steps=1000)
if args.merge and args.teacher:
    m.die('--merge is for a student; leave --teacher away')
if args.merge and Path(args.merge).exists():
    m.die(f'--merge {args.merge} exists; choose a new folder')
if Path(args.out).is_dir():
    m.die(f'--out {args.out} is a folder; give the name of a PNG')
m.writable_folder(Path(args.merge or args.out).parent, '--merge' if args.merge else '--out')
folder, facts = m.find_student(args.ckpt)
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
    with m.replacing(args.merge) as tmp:
        pipe.save_pretrained(tmp)
        (tmp / 'student.json').write_text(json.dumps(facts | dict(lora=None), indent=1))
    print(f'{args.merge}: {folder} as a whole pipeline, {dtype}')
    raise SystemExit
pipe.to(device).set_progress_bar_config(disable=True)
if args.compile:
    m.compile_pipeline(pipe)
pictures, clock = [], [time.time()]
for k in range(0, args.n, args.batch):
    index = range(args.n)[k:k + args.batch]
    texts = [prompts[i] for i in index]
    pictures.append(m.generate(pipe, texts, index, args.seed, args.steps, args.cfg))
    clock.append(time.time())
m.picture_grid([torch.cat(pictures) * 2 - 1], prompts, args.out)
count = len(pictures[0])
speed = f'{(clock[1] - clock[0]) / count:.3f} s per picture in the first call'
if args.n > count:
    speed += f', {(clock[-1] - clock[1]) / (args.n - count):.3f} s after it'
print(f'{args.out}: {args.n} pictures, {speed} ({device})')
