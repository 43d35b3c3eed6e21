"""How rows reach their experts. A strategy is one function, run inside shard_map on one device's part:

    strategy(x_TD, routing, params, cell: Local) -> (y_TD, Accounting)

`all_to_all` wants tokens cut over the expert axis, `all_reduce` wants them replicated over it.
"""
