"""Other libraries taught to open our own folder: transformers, through its registry of quantizers.

`hook` is what `import qalora` installs; it imports nothing until transformers' registry is imported. `transformers`
holds the quantizer, `layers` the modules that keep packed codes in memory.
"""
