"""Commands that measure; each prints its options with `--help`, and README.md lists them.

A module here is a command; its parts lie in the folder of its topic. `models` is both folder and
command. What topics share is in `shared`, what is made of result files in `pages`; `torch_internals` is
the one place of private names of torch. `results` and `profiles` hold what was measured.
"""
