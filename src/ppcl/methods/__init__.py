"""Methods, which are ways to choose the intervals. Importing this package loads no torch.

To add a method, write two files: a module in this package that defines one subclass of `Method`, and a YAML file in
`conf/method/` whose `rule` is the name of that module.
"""
