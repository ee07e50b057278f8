"""What `plan` is made of: accelerators by name, the step without its arrays, FLOPs, memory."""
