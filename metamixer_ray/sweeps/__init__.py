"""Sweeps: spaces, who proposes, what a trial does, what is recorded and found. The spine's ``tune.py`` joins them.

- `config` the options; `spaces` what is searched; `proposing` what is tried next.
- `trial` one training under Ray Tune; `engine` many of them on one cluster; `watching` follows them.
- `ledger` the record that a killed sweep goes on from; `opening` the sweep's folder.
- `findings` and `portraits`: what came of it.
"""
