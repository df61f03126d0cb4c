"""What is wrong with a model's batch norms, as figures, verdicts and reports. Nothing here knows a framework.

estimate    moving statistics from the moments of batches      figures   what was measured of a model and its layers
verdicts    figures -> verdicts, each with reason and cure     report    text, HTML and dict          plot   a picture
"""
