"""
Miniatures with random weights of the families that have no trained toy: pipelines of diffusers' own
classes at 64 px, written as those are published.
"""

import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, models, pre_tokenizers

from conftest import ROOT

def tokenizer(*texts):
    """One that knows the words of the toy's prompts and of texts."""
    split = pre_tokenizers.Whitespace()
    prompts = (ROOT / 'assets/toy/data/prompts.txt').read_text()
    words = {word for text in (prompts, *texts) for word, _ in split.pre_tokenize_str(text)}
    places = {word: i for i, word in enumerate(['<pad>', '<unk>', *sorted(words)])}
    found = Tokenizer(models.WordLevel(places, unk_token='<unk>'))
    found.pre_tokenizer = split
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=found, pad_token='<pad>', unk_token='<unk>')

def qwen():
    """Qwen-Image's pipeline; its scheduler is told to shift by the number of tokens, as its own."""
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
    net = QwenImageTransformer2DModel(
        num_layers=2, attention_head_dim=24, num_attention_heads=2, joint_attention_dim=32,
        axes_dims_rope=(8, 8, 8))
    net.register_to_config(sample_size=8)
    # the pipeline cuts off 34 tokens in front of the prompt
    words = tokenizer(
        '<|im_start|>system Describe the image by detailing the color, shape, size, texture, '
        'quantity, text, spatial relationships of the objects and background:<|im_end|> user')
    text = transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, bos_token_id=0, eos_token_id=0,
            rope_scaling=dict(type='mrope', mrope_section=[2, 3, 3])),
        vision_config=dict(depth=1, hidden_size=16, intermediate_size=32, num_heads=2,
                           out_hidden_size=32)))
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=.5, max_shift=.9, max_image_seq_len=8192,
        shift_terminal=.02)
    return QwenImagePipeline(
        scheduler=scheduler, vae=AutoencoderKLQwenImage(base_dim=8), text_encoder=text,
        tokenizer=words, transformer=net)

def zimage():
    """Z-Image's pipeline; the frame of its chat is 24 tokens, so that the text of one prompt is
    filled up to 32, of another to 64."""
    from diffusers import AutoencoderKL, ZImagePipeline, ZImageTransformer2DModel
    net = ZImageTransformer2DModel(
        dim=48, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
        axes_dims=(8, 8, 8))
    net.register_to_config(sample_size=8)
    for token in net.x_pad_token, net.cap_pad_token:                             # zeros as they are
        torch.nn.init.normal_(token)
    frame = 'user ' * 21
    words = tokenizer(frame + '. assistant')
    words.chat_template = frame + '{{ messages[0].content }} . assistant .'
    text = transformers.Qwen3Model(transformers.Qwen3Config(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16))
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4, down_block_types=['DownEncoderBlock2D'] * 4,
        up_block_types=['UpDecoderBlock2D'] * 4, latent_channels=16, norm_num_groups=4,
        scaling_factor=.3611, shift_factor=.1159, use_quant_conv=False, use_post_quant_conv=False)
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.), vae=vae, text_encoder=text,
        tokenizer=words, transformer=net)

def build(name, folder):
    """Writes the miniature of that name into a folder, and returns it."""
    torch.manual_seed(0)
    dict(qwen=qwen, zimage=zimage)[name]().save_pretrained(folder)
    return folder
