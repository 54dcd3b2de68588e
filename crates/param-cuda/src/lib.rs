//! A GPU opened safely, and the kernels that run on it. Nothing here is needed to build: the driver is looked for at run time, and where
//! there is none, opening it says so.
