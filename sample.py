"""
Pictures from a distilled student, or from its teacher for comparison, as one PNG.

    python sample.py --steps 4                                     # the newest student, its own prompts
    python sample.py --prompt "a red fox in snow" --n 16
    python sample.py --teacher --steps 50 --cfg 7                  # the base model, same prompts, same first noise
    python sample.py --merge out/pipeline                          # no pictures: a LoRA student as a pipeline folder

The student is a diffusers pipeline; see the README for using it without this repository.
"""

import argparse
import json
import time
from pathlib import Path

import torch

import model as m

p = m.parser(__doc__)
p.add_argument('--ckpt', default='', help='run folder or student pipeline; empty: newest of out/stage2, out/stage1, else '
               'the shipped one')
p.add_argument('--teacher', action=argparse.BooleanOptionalAction, default=False,
               help="draw with the student's base model instead")
p.add_argument('--steps', type=int, default=4, help='sampling steps')
p.add_argument('--cfg', type=float, default=7., help='guidance of the teacher; a student needs none')
p.add_argument('--prompt', default='', help="one prompt for all pictures; empty: --prompts")
p.add_argument('--prompts', default='', help='text file, one prompt per line; empty: those the student was watched with')
p.add_argument('--n', type=int, default=16, help='pictures; prompts repeat in turn')
p.add_argument('--batch', type=int, default=8, help='pictures per call')
p.add_argument('--seed', type=int, default=0, help='picture i depends on (seed, i) alone')
p.add_argument('--compile', action=argparse.BooleanOptionalAction, default=False,
               help='torch.compile: a slow first call, faster ones after it')
p.add_argument('--out', default='samples.png', help='PNG to write')
p.add_argument('--merge', default='', help='write the student as a whole pipeline folder instead, its LoRA merged into the weights')
args = p.parse_args()
m.at_least(args, steps=1, n=1, batch=1, seed=0, cfg=0)
if args.steps > 1000:
    m.die(f'--steps {args.steps} is more than the 1000 noise levels there are')
m.writable_folder(Path(args.merge or args.out).parent, '--merge' if args.merge else '--out')
if args.merge and (args.teacher or Path(args.merge).exists()):
    m.die('--merge is for a student; leave --teacher away' if args.teacher else f'--merge {args.merge} exists; choose a new folder')

folder, facts = m.find_student(args.ckpt)
if Path(args.out).is_dir():
    m.die(f'--out {args.out} is a folder; give the name of a PNG')
prompts = [args.prompt] if args.prompt else m.read_prompts(args.prompts) if args.prompts else facts['prompts']
prompts = [prompts[i % len(prompts)] for i in range(args.n)]
device, dtype = ('cuda', torch.float16) if torch.cuda.is_available() else ('cpu', torch.float32)
source = facts['base_model'] if args.teacher else folder
pipe = m.load_pipeline(source, "--teacher: the student's base model", dtype, facts.get('t5')) if args.teacher else \
    m.load_student(folder, facts, dtype)
if args.merge:
    if facts.get('lora'):
        pipe.fuse_lora(), pipe.unload_lora_weights()
    with m.replacing(args.merge) as tmp:
        pipe.save_pretrained(tmp)
        (tmp / 'student.json').write_text(json.dumps(facts | dict(lora=None), indent=1))
    print(f'{args.merge}: {folder} as a whole pipeline, {dtype}')
    raise SystemExit
pipe.to(device)
pipe.set_progress_bar_config(disable=True)
if args.compile:
    m.compile_pipeline(pipe)

if args.teacher:
    print(f'{source}, {args.steps} steps of {type(pipe.scheduler).__name__}, guidance {args.cfg}')
else:
    steps = m.Schedule(pipe.scheduler).steps(args.steps).long().tolist()
    kind = ("its own steps" if steps == facts['steps'] else "a subset of its steps" if set(steps) < set(facts['steps'])
            else "a finer grid than its steps" if set(steps) > set(facts['steps']) else "other steps than its own")
    print(f'{folder}, iteration {facts["iteration"]} on {facts["base_model"]}, {kind}: {steps}')

pictures, seconds = [], []
for i in range(0, args.n, args.batch):
    began = time.time()
    part = prompts[i:i + args.batch]
    pictures.append(m.generate(pipe, part, range(i, i + len(part)), args.seed, args.steps, args.cfg))
    seconds.append((time.time() - began, len(part)))
m.picture_grid([torch.cat(pictures) * 2 - 1], prompts, args.out)
first, rest = seconds[0], seconds[1:]
print(f'{args.out}: {args.n} pictures, {first[0] / first[1]:.3f} s per picture in the first call'
      + (f', {sum(t for t, _ in rest) / sum(k for _, k in rest):.3f} s after it' if rest else '') + f' ({device})')
