"""What the tests and the evidence share: a ComfyUI in this process, models, sampling, servers. Not shipped."""
