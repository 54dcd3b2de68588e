//! Linear layers `y = x W^T + b`, forward and backward.

use param_kernels::{Kernels, Matrix, Product};

use super::machine::Machine;
use super::values::Values;

/// Whether a gradient replaces what is there or is added to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    Replace,
    Add,
}

/// `y = x W^T + b`.
pub fn forward(machine: &mut Machine, y: &mut Values, x: Matrix, weight: Matrix, bias: Option<&[f32]>) {
    let product = Product::new(machine.precision, x.factor(), weight.t());
    store(machine, y, product, bias);
}

/// `y = product + b`.
pub fn store(machine: &mut Machine, y: &mut Values, product: Product, bias: Option<&[f32]>) {
    let (kernels, precision) = (Kernels::get(), machine.precision);
    let (n_row, shape) = (y.n_row(), (y.n_col, precision.per_word()));
    machine.multiply(
        [&mut y.words],
        shape,
        &[0, n_row],
        |_| product,
        |[out], _, cols, sums| {
            if let Some(bias) = bias {
                kernels.axpy(1.0, &bias[cols], sums);
            }
            precision.store(kernels, sums, out);
        },
    );
}

/// The gradient of `x` given that of `y`: `dx = dy W`, or added to what is there.
pub fn backward_input(machine: &mut Machine, dx: &mut [f32], write: Write, dy: Matrix, weight: Matrix, n_in: usize) {
    let kernels = Kernels::get();
    let n_row = dx.len() / n_in;
    let product = Product::new(machine.precision, dy.factor(), weight.factor());
    machine.multiply(
        [dx],
        (n_in, 1),
        &[0, n_row],
        |_| product,
        |[out], _, _, sums| match write {
            Write::Replace => out.copy_from_slice(sums),
            Write::Add => kernels.axpy(1.0, sums, out),
        },
    );
}

/// Adds to `dweight` [n_out, n_in] the gradient `dy^T x`.
pub fn backward_weight(machine: &mut Machine, dweight: &mut [f32], dy: Matrix, x: Matrix, n_in: usize) {
    let n_out = dweight.len() / n_in;
    let product = Product::new(machine.precision, dy.t(), x.factor());
    machine.multiply_add(dweight, n_in, &[0, n_out], |_| product);
}

/// `sums[j] += sum_i x[i, j]` for some rows `x`, in row order whatever the number of threads.
pub fn add_column_sums(machine: &mut Machine, x: Matrix, sums: &mut [f32]) {
    // Wide enough for whole cache lines, narrow enough to give every thread its columns.
    const COLUMNS: usize = 64;
    let kernels = Kernels::get();
    machine.team.for_each_chunk(sums, COLUMNS, |i, sums| {
        kernels.add_column_sums(&x.cols(i * COLUMNS..i * COLUMNS + sums.len()), sums);
    });
}
