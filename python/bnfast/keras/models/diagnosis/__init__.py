"""diagnose, recalibrate and Watch: what a Keras model's batch norms see, and statistics computed from it.

probe         runs a model with chosen statistics in each batch norm and shows what it sees; the model stays as it is
source        the batches of arrays, datasets, PyDatasets and generators
recalibrate   moving statistics from data            diagnose      figures for bnfast.diagnosis.verdicts
score         loss and metrics of outputs            watch         a callback
"""
