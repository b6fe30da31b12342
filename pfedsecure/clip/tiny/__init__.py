"""The embedded demo backbone `tiny-clip`: an open_clip configuration, its weights, and the script that trains them.

`tiny-clip.json` is a model configuration for `open_clip.add_model_config`; `tiny-clip.safetensors` holds its weights in
float16, with the seed, steps, versions and measured zero-shot accuracy in the file's metadata. Rebuild them with
`python -m pfedsecure.clip.tiny.pretrain --out DIR`.
"""
