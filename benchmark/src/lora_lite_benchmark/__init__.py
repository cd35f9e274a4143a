"""Trains lora-lite variants on questions and answers, and tests them on word problems.

The modules in the order of the protocol:

    config, preset      what is run
    data                questions and answers
    models, variants    the base and the adapter
    train               the loop
    evaluate            exact match and loss
    measure             time and memory
    verify              the saved file is the trained adapter
    run                 the protocol: all of the above for one row
    series              many rows
    results             one JSON file for each run
    rows, stats         the runs of a row, and how sure its figures are
    table, plot, report what a reader sees
    cli                 the command
"""
