"""Building a bench: a generator model writes questions or personas to a plan, and filters decide which are kept.

The construction of PersonalityBench (NPTI, arXiv 2410.12327, section 3): facet descriptions crossed with everyday
topics. One module a step: ``plan`` says what is asked for, ``prompts`` how, ``endpoint`` and ``local`` get answers,
``parse`` reads them, ``filters``, ``judge`` and ``duplicates`` reject, ``journal`` and ``store`` remember, ``builder``
runs it all.
"""
