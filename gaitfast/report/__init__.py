"""What a run learnt, as figures and one self-contained page. Reads a run folder; imports nothing that trains.

`run` reads the folder, `headline` picks the figures of merit, `curves` and `sheets` draw, `markup` writes HTML and
`page` puts the report together (`gaitfast report RUN`).
"""
