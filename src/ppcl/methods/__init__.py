"""Methods: ways to choose the intervals. Importing this loads no torch.

A method takes two files: a module here, which declares one class of `Method`, and a YAML in `conf/method/` whose
`rule` is the module's name.
"""
