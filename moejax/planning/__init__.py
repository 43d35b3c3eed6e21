"""What a model's programs do on devices that are not at hand: compiled from shapes alone, and read.

`topologies` makes the devices and `programs` compiles a model's step for them; `hlo`, `collectives`, `schedule` and
`flops` read what the compiler made of it.
"""
