"""What things cost on a device: measured, kept, predicted where nothing was measured.

identity    what a device is called, and which settings decide its times
profile     a table of measurements, of peaks, and of the verdicts of races; its rows' keys: `keys`
measuring   makes rows: of `convolutions` and `operators`, out of `caches`, in turns (`timing`, `arena`)
prediction  a convolution that was not measured, from those that resemble it
store, own  where profiles lie: those given and shipped, and the device's own
unsafe      kernels that are wrong in channels-last and must not be run
"""
