"""What the runs of all commands share, from the checks before their first step to the files that they leave: settings and errors,
the output folder, one process that writes, torchrun's processes, device and memory. It knows nothing of what is run."""
