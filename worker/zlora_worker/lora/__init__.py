"""From LoRA files to weights that are merged into the base model.

* `reader`: a file becomes a `Lora`. `key_map` finds the module of each tensor, `tensor_file` reads
  the tensors, `adapter_config` knows their scales, and `adapter_formats` makes `deltas` of them
* `memory_cache`: LoRAs that were read
* `weights`: the base model's weights in stacks; `block_names` are those of a UNet's blocks
* `merge`, `patch`: base weights plus deltas; the place of the sums for the time of a job
"""
