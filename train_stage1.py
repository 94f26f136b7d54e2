"""
Flash-DMD, stage 1: a many-step teacher becomes a few-step student. Per iteration (arXiv 2511.20549, algorithm 1):

    high noise   x0 = G(x_s), s by backward simulation       DM loss, eq. 4: teacher's score against the fake score
    low noise    x0 = G(x_249), decoded to pixels            pixel GAN, eq. 8-9: heads on a frozen SAM encoder
    always       fake score: diffusion loss on G's samples, eq. 6, and pulled towards G after its update, eq. 11
                 discriminator heads: hinge on real against generated pictures

    python train_stage1.py                                  # CUDA: SDXL; else: the toy, 5 minutes on a laptop
    torchrun --nproc_per_node=8 train_stage1.py             # 8 GPUs, the same result
    python train_stage1.py --recipe sd3                     # SD3-Medium, LoRA
    python train_stage1.py --gan latent --no-split --ttur 5 --couple 1 --out out/dmd2      # DMD2, for comparison

Running the same command again resumes. out/stage1 gets state-*/ (everything), student/ (a diffusers pipeline, or
adapters), log.jsonl, samples-*.png, curves.png.
"""

import torch

import model as m

# ---------------------------------------------------------------------------------------------------------------------
# settings: a recipe is a column of defaults, and every flag overrides its entry. SDXL's learning rates, GAN weight and
# guidance are not in the paper and nobody has tuned them here: DMD2's and SenseFlow's neighbourhood

RECIPES = {
    'sdxl': dict(
        model='stabilityai/stable-diffusion-xl-base-1.0', sam='vit_b', data='jackyhate/text-to-image-2M',
        data_files='data_1024_10K/*.tar', image_column='jpg', text_column='json.prompt', prompts='assets/prompts.txt',
        batch=64, micro=1, iters=1000, student_lr=1e-6, fake_lr=1e-6, heads_lr=1e-4, warmup=50, cooldown=0, cfg=8.,
        gan_weight=1e-2, checkpointing=True, save_every=250, sample_every=250, log_every=1),
    # rank, learning rates, alpha: RTDMD's and DMDR's neighbourhood; batch, iterations, ttur, guidance: the paper's
    'sd3': dict(
        model='stabilityai/stable-diffusion-3-medium-diffusers', sam='vit_b', data='jackyhate/text-to-image-2M',
        data_files='data_1024_10K/*.tar', image_column='jpg', text_column='json.prompt', prompts='assets/prompts.txt',
        lora=64, ttur=2, batch=32, micro=1, iters=4000, student_lr=3e-5, fake_lr=3e-5, heads_lr=1e-4, warmup=50, cooldown=0,
        cfg=7., gan_weight=1e-2, checkpointing=True, save_every=250, sample_every=250, log_every=1),
    # tuned on seed 0 by `python evaluate.py`, R-precision / CMMD; the teacher has 87.5 % / .096, its weights as a student
    # untrained 63.7 % / .194. Student and fake lr 1e-4, 4e-4, CFG 3, 300 iterations with cool-down (these): 83.6 / .087;
    # 250 without: 83.6 / .084. 5e-5, 2e-4, no cool-down: 82.8 / .086 with CFG 4 and 81.2 / .069 with CFG 2.5 at 250,
    # 78.5 / .082 with CFG 3 at 400, it had begun to drift. No GAN, 1e-4, 3e-4, 250: 76.6 / .117. Real pictures sent
    # through the VAE, so that the heads cannot go by its blur (real_view as decode(latents(pixels)), not kept):
    # 80.9 / .094 against 82.8 / .086. gan_weight .1 makes |dGAN| .5 to 1 of |dDM|, .01 made it .04
    'toy': dict(
        model='assets/toy/sdxl', sam='assets/toy/sam.pth', data='assets/toy/data', data_files='train.parquet',
        image_column='image', text_column='text', prompts='assets/toy/data/prompts.txt',
        batch=16, micro=16, iters=300, student_lr=1e-4, fake_lr=4e-4, heads_lr=2e-4, warmup=30, cooldown=100, cfg=3.,
        gan_weight=.1, checkpointing=False, save_every=100, sample_every=100, log_every=10),
    # a first try on seed 0: 55.9 % / .138, its teacher 64.8 / .091. No better: student lr 5e-4, 400 iterations, cool-down 150:
    # 55.1 / .142; all weights (--no-lora) with lr 1e-4, 4e-4: 53.9 / .135
    'toy-sd3': dict(
        model='assets/toy/sd3', sam='assets/toy/sam.pth', data='assets/toy/data', data_files='train.parquet',
        image_column='image', text_column='text', prompts='assets/toy/data/prompts.txt',
        lora=32, batch=16, micro=16, iters=300, student_lr=1e-3, fake_lr=2e-3, heads_lr=2e-4, warmup=30, cooldown=100, cfg=3.,
        gan_weight=.1, checkpointing=False, save_every=100, sample_every=100, log_every=10),
}

# adapters learn at other rates than whole networks; SDXL's are those of DMD2's LoRA run, untried
LORA_RATES = {'sdxl': dict(student_lr=5e-5, fake_lr=5e-5), 'toy': dict(student_lr=1e-3, fake_lr=2e-3)}

p = m.parser(__doc__)
p.add_argument('--recipe', choices=RECIPES, default='sdxl' if torch.cuda.is_available() else 'toy', help='table of defaults')
p.add_argument('--out', default='out/stage1', help='folder of the run; holds its state, so the same command resumes')
m.training_flags(p, model_help='teacher: an SDXL or SD3 pipeline, folder or hub id')
first, _ = p.parse_known_args()
p.set_defaults(**RECIPES[first.recipe])
if first.gan == 'latent':
    p.set_defaults(gan_weight=5e-3)                                                              # DMD2's
if first.lora and not RECIPES[first.recipe].get('lora'):
    p.set_defaults(**LORA_RATES[first.recipe])
args = p.parse_args()

# ---------------------------------------------------------------------------------------------------------------------
# ranks and device, teacher, student, fake score, discriminator

run = m.Run(args)
base = m.Base(args.model, device=run.device, dtype=torch.bfloat16 if run.cuda else torch.float32, t5=args.t5,
              offload=args.offload)
d = m.Distillation(base, run)
steps, student, fake = d.steps, d.student, d.fake
start = m.load_state(run.out, d.nets, d.opts, vars(args))
d.distribute()

# ---------------------------------------------------------------------------------------------------------------------
# data, log

pictures = m.Pictures(args.data, args.data_files, args.image_column, args.text_column, base.size, args.seed)
loader = pictures.batches(args.batch, run.rank, run.world, range(start, args.iters), args.workers)
prompts = m.read_prompts(args.prompts)[:8]
grid_noise = m.draw(args.seed, 0, range(len(prompts)), (len(steps),) + base.latent_shape)[0].to(run.device)
teacher_row = base.teacher_samples(prompts, grid_noise[:, 0], 50, args.cfg) if run.master and args.sample_every else None
run.open_log(start)
run.print(f'recipe {args.recipe}: {args.model} -> {run.out}, {run.world} x {run.device.type}, '
          f'{sum(w.numel() for w in m.trained(student).values()) / 1e6:.1f} M trained parameters'
          + f' (LoRA, rank {args.lora})' * bool(args.lora) + f', {len(pictures.rows)} pictures')
run.print(f'steps {steps.long().tolist()}, SNR {[round(v, 3) for v in d.schedule.snr(steps).tolist()]}, batch {args.batch} = '
          f'{run.world} ranks x {len(run.mine) // args.micro} x {args.micro}, from iteration {start}')
LINE = {'dm/': 'dm', 'fake': 'fake', 'gan/g': 'g', 'gan/d': 'd', 'grad/dm': '|dDM|', 'grad/gan': '|dGAN|'}

# ---------------------------------------------------------------------------------------------------------------------
# the loop

for it in range(start, args.iters + 1):
    last = it == args.iters
    stop = run.told_to_stop(it) or last
    if run.master and args.sample_every and (it % args.sample_every == 0 or last):
        m.picture_grid([teacher_row, d.pictures(prompts, grid_noise)], prompts, run.out / f'samples-{it:07d}.png',
                       ['teacher\n50 steps', f'student\n{len(steps)} steps'])
    if it > start and (it % args.save_every == 0 or stop) or last:
        d.save(it, dict(prompts=prompts), stop)
    if stop:
        break

    d.learning_rates(it)
    turn = it % args.ttur == 0                                                             # of the student to learn
    rows = next(loader)
    run.skipped += int(rows['skipped'].sum())
    parts = d.parts(it, rows['text'], rows['pixels'])

    # 1. the student's sample at a high-noise step, 2. its DM gradient, 3. the GAN's at a low-noise step, 4. their sum
    for part in parts:
        d.student_backward(part, it, turn, 1 / len(parts))
    sizes = [m.update(d.opts['student'], student)] if turn else []
    if turn and sizes[0] is not None:
        run.note('norm/student', sizes[0])
        m.couple(fake, student, args.couple)

    # 5. the fake score learns the student's samples, 6. the discriminator tells real from generated
    for part in parts:
        d.critic_backward(part, it, 1 / len(parts))
    sizes += [m.update(d.opts[name], d.nets[name]) for name in d.nets if name != 'student']
    run.count(it, sizes)

    if (it + 1) % args.log_every == 0:
        run.report(it + 1, LINE)

run.close(it)
