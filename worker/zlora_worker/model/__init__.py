"""The base model: loaded once, lent to one job at a time, checked after each job.

* `loader`: a hub id, a folder or a file becomes diffusers' pipeline; `family` and `families` say in
  what models differ, `digests` keeps what need not be computed again
* `base`, `bases`: one base model in memory; those that requests may name, of which one is resident
* `pipeline`: merges the LoRAs of a job, draws, restores and checks; `checksum` compares the bits
* `text_encoding`, `chat_prompt`, `embedding_file`: prompts become hidden states, with embeddings
* `schedulers`, `starting_image`, `denoising`, `preview`, `vae`: hidden states become images
* `out_of_memory`, `compiled_blocks`, `conditions`: lack of memory, compilation, replay
"""
