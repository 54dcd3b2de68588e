//! What operations are given: parts of buffers, and matrices in them, whose bounds were checked where they were made.

use std::marker::PhantomData;
use std::ops::Range;

use bytemuck::Pod;

use crate::kernel::{Arg, IntoArg};
use crate::memory::Buffer;

/// Part of a [`Buffer`], to be read or written by kernels. Nothing of it is ever referred to on the host, so that any number of views
/// may overlap: what kernels make of that is decided by the order of the stream.
#[derive(Debug)]
pub struct View<'a, T> {
    address: u64,
    len: usize,
    of: PhantomData<&'a Buffer<T>>,
}

impl<T> Clone for View<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for View<'_, T> {}

impl<T> Buffer<T> {
    /// All of it.
    pub fn view(&self) -> View<'_, T> {
        View { address: self.address(), len: self.len(), of: PhantomData }
    }
}

impl<'a, T> View<'a, T> {
    /// Elements.
    pub fn len(self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// Where it starts on the GPU.
    pub fn address(self) -> u64 {
        self.address
    }

    /// The same, from which kernels read 16 bytes at a time.
    ///
    /// # Panics
    /// At an address that is no multiple of them.
    pub(super) fn aligned(self) -> Self {
        assert!(self.address.is_multiple_of(16), "{} is no multiple of 16 bytes", self.address);
        self
    }

    /// The elements `range` of it.
    ///
    /// # Panics
    /// Beyond the end.
    pub fn part(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "elements {range:?} of {}", self.len);
        let address = self.address + (range.start * size_of::<T>()) as u64;
        View { address, len: range.len(), of: PhantomData }
    }
}

impl<'a, T: Pod> View<'a, T> {
    /// The same bytes as elements of another type, as many as there is room for.
    ///
    /// # Panics
    /// At an address that is no multiple of the other type's size.
    pub fn cast<U: Pod>(self) -> View<'a, U> {
        assert!(self.address.is_multiple_of(size_of::<U>() as u64), "elements at odd addresses");
        View { address: self.address, len: self.len * size_of::<T>() / size_of::<U>(), of: PhantomData }
    }
}

impl<T> IntoArg for View<'_, T> {
    fn arg(&self) -> Arg {
        Arg::value(self.address)
    }
}

/// An optional view's address, or null.
impl<T> IntoArg for Option<View<'_, T>> {
    fn arg(&self) -> Arg {
        Arg::value(self.map_or(0, View::address))
    }
}

/// Type of activations: `Stored` in train.cuh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Element {
    /// Exactly.
    F32,
    /// Rounded to the nearest, 16 bits.
    Bf16,
}

impl Element {
    /// Bytes of one.
    pub fn bytes(self) -> usize {
        match self {
            Element::F32 => 4,
            Element::Bf16 => 2,
        }
    }

    /// Elements that rows are padded to a multiple of: 16 bytes, which kernels copy at a time.
    pub fn per_copy(self) -> usize {
        16 / self.bytes()
    }
}

/// A matrix in a buffer, by rows. Addresses of rows are multiples of 16 bytes.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    address: u64,
    element: Element,
    n_row: usize,
    n_col: usize,
    stride: usize,
    of: PhantomData<&'a Buffer<u8>>,
}

impl<'a> Rows<'a> {
    /// `n_row` rows of `n_col` elements, each row padded to a multiple of 16 bytes, at the start of `bytes`.
    ///
    /// # Panics
    /// If they do not fit.
    pub fn new(bytes: View<'a, u8>, element: Element, n_row: usize, n_col: usize) -> Self {
        let stride = n_col.next_multiple_of(element.per_copy());
        let needed = n_row * stride * element.bytes();
        assert!(needed <= bytes.len(), "{n_row} rows of {n_col}: {needed} bytes of {}", bytes.len());
        assert!(bytes.address().is_multiple_of(16), "a matrix begins at a multiple of 16 bytes");
        Self { address: bytes.address(), element, n_row, n_col, stride, of: PhantomData }
    }

    /// Rows of f32 without padding.
    ///
    /// # Panics
    /// If they are not all of `floats`, or would be padded.
    pub fn floats(floats: View<'a, f32>, n_row: usize, n_col: usize) -> Self {
        assert_eq!(floats.len(), n_row * n_col, "{n_row} rows of {n_col}");
        assert!(n_col.is_multiple_of(Element::F32.per_copy()), "{n_col} columns would be padded");
        Self::new(floats.cast(), Element::F32, n_row, n_col)
    }

    /// Bytes that [`Rows::new`] takes.
    pub fn bytes(element: Element, n_row: usize, n_col: usize) -> usize {
        n_row * n_col.next_multiple_of(element.per_copy()) * element.bytes()
    }

    /// Type of its elements.
    pub fn element(self) -> Element {
        self.element
    }

    /// Rows.
    pub fn n_row(self) -> usize {
        self.n_row
    }

    /// Columns.
    pub fn n_col(self) -> usize {
        self.n_col
    }

    /// Elements from one row to the next.
    pub fn stride(self) -> usize {
        self.stride
    }

    /// Where it starts on the GPU.
    pub fn address(self) -> u64 {
        self.address
    }

    /// The rows `range`.
    ///
    /// # Panics
    /// Beyond the end.
    pub fn rows(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.n_row, "rows {range:?} of {}", self.n_row);
        let address = self.address + (range.start * self.stride * self.element.bytes()) as u64;
        Self { address, n_row: range.len(), ..self }
    }

    /// The columns `range`, which begin at a multiple of 16 bytes.
    ///
    /// # Panics
    /// Beyond the end, or at another column.
    pub fn cols(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.n_col, "columns {range:?} of {}", self.n_col);
        assert!(range.start.is_multiple_of(self.element.per_copy()), "column {} begins between copies", range.start);
        let address = self.address + (range.start * self.element.bytes()) as u64;
        Self { address, n_col: range.len(), ..self }
    }
}

impl IntoArg for Rows<'_> {
    fn arg(&self) -> Arg {
        Arg::value(self.address)
    }
}
