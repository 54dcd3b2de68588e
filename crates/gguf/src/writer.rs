//! Writing a model as a stream: header first, then each tensor's data in order, so that nothing has to fit in memory.

use std::collections::HashSet;
use std::io::{self, Write};

use byteorder::{LittleEndian, WriteBytesExt};

use crate::{Array, Error, MAGIC, MAX_TENSOR_NAME, Metadata, Result, TensorInfo, VERSION, Value, parse};

/// A model being written. Tensor data follows in the order of the infos, through [`Writer::append`].
#[derive(Debug)]
pub struct Writer<W: Write> {
    out: W,
    alignment: u64,
    tensors: Vec<TensorInfo>,
    /// The tensor whose data comes next.
    current: usize,
    /// Bytes of it that are written.
    written: u64,
}

impl<W: Write> Writer<W> {
    /// Writes the header: the metadata, and the tensors with their offsets, which it assigns. `general.alignment` in
    /// the metadata decides the alignment. `out` should buffer.
    ///
    /// # Errors
    /// A name twice, empty or over 63 bytes, a shape or type that disagree with `n_bytes`, an unusable alignment, or
    /// whatever `out` reports.
    pub fn new(mut out: W, metadata: &Metadata, mut tensors: Vec<TensorInfo>) -> Result<Writer<W>> {
        let alignment = parse::alignment(metadata)?;
        let mut names = HashSet::with_capacity(tensors.len());
        let mut offset = 0u64;
        for tensor in &mut tensors {
            if tensor.name.is_empty() || tensor.name.len() > MAX_TENSOR_NAME {
                let problem = format!("a name has 1 to {MAX_TENSOR_NAME} bytes, this has {}", tensor.name.len());
                return Err(Error::Tensor { name: tensor.name.clone(), problem });
            }
            if !names.insert(tensor.name.clone()) {
                return Err(Error::DuplicateTensor { name: tensor.name.clone() });
            }
            // The fields are public: what they say together is checked again.
            *tensor = TensorInfo { offset, ..TensorInfo::new(&*tensor.name, tensor.ne.clone(), tensor.ty)? };
            let end = offset.checked_add(tensor.n_bytes).and_then(|end| parse::padded(end, alignment));
            offset = end.ok_or_else(|| Error::Tensor {
                name: tensor.name.clone(),
                problem: "the file would exceed 64 bits".to_owned(),
            })?;
        }

        let mut header = Vec::new();
        header.extend_from_slice(&MAGIC);
        header.write_u32::<LittleEndian>(VERSION)?;
        header.write_u64::<LittleEndian>(tensors.len() as u64)?;
        header.write_u64::<LittleEndian>(metadata.len() as u64)?;
        for (key, value) in metadata.iter() {
            write_string(&mut header, key)?;
            header.write_u32::<LittleEndian>(value.value_type() as u32)?;
            write_value(&mut header, value)?;
        }
        for tensor in &tensors {
            write_string(&mut header, &tensor.name)?;
            header.write_u32::<LittleEndian>(tensor.ne.len() as u32)?;
            for &dim in &tensor.ne {
                header.write_u64::<LittleEndian>(dim)?;
            }
            header.write_u32::<LittleEndian>(tensor.ty.id())?;
            header.write_u64::<LittleEndian>(tensor.offset)?;
        }
        out.write_all(&header)?;
        pad(&mut out, header.len() as u64, alignment)?;
        Ok(Writer { out, alignment, tensors, current: 0, written: 0 })
    }

    /// Appends bytes to the data of tensor `name`, which must be the one whose turn it is; whole or in pieces.
    ///
    /// # Errors
    /// Another tensor's turn, more bytes than the tensor has, or whatever the output reports.
    pub fn append(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let error = |problem| Err(Error::Tensor { name: name.to_owned(), problem });
        let Some(tensor) = self.tensors.get(self.current) else {
            return error("all tensors are written already".to_owned());
        };
        if tensor.name != name {
            return error(format!("the turn is that of `{}`", tensor.name));
        }
        let left = tensor.n_bytes - self.written;
        if bytes.len() as u64 > left {
            return error(format!("{} bytes too many for its {}", bytes.len() as u64 - left, tensor.n_bytes));
        }
        self.out.write_all(bytes)?;
        self.written += bytes.len() as u64;
        if self.written == tensor.n_bytes {
            pad(&mut self.out, self.written, self.alignment)?;
            self.current += 1;
            self.written = 0;
        }
        Ok(())
    }

    /// Flushes and gives the output back.
    ///
    /// # Errors
    /// A tensor whose data is not complete, or whatever the output reports.
    pub fn finish(mut self) -> Result<W> {
        if let Some(tensor) = self.tensors.get(self.current) {
            let problem = format!("{} of its {} bytes were written", self.written, tensor.n_bytes);
            return Err(Error::Tensor { name: tensor.name.clone(), problem });
        }
        self.out.flush()?;
        Ok(self.out)
    }
}

fn pad(out: &mut impl Write, written: u64, alignment: u64) -> io::Result<()> {
    io::copy(&mut io::Read::take(io::repeat(0), written.wrapping_neg() % alignment), out).map(|_| ())
}

fn write_string(out: &mut Vec<u8>, string: &str) -> io::Result<()> {
    out.write_u64::<LittleEndian>(string.len() as u64)?;
    out.write_all(string.as_bytes())
}

fn write_value(out: &mut Vec<u8>, value: &Value) -> io::Result<()> {
    match value {
        Value::U8(v) => out.write_u8(*v),
        Value::I8(v) => out.write_i8(*v),
        Value::U16(v) => out.write_u16::<LittleEndian>(*v),
        Value::I16(v) => out.write_i16::<LittleEndian>(*v),
        Value::U32(v) => out.write_u32::<LittleEndian>(*v),
        Value::I32(v) => out.write_i32::<LittleEndian>(*v),
        Value::F32(v) => out.write_f32::<LittleEndian>(*v),
        Value::Bool(v) => out.write_u8((*v).into()),
        Value::String(v) => write_string(out, v),
        Value::Array(v) => write_array(out, v),
        Value::U64(v) => out.write_u64::<LittleEndian>(*v),
        Value::I64(v) => out.write_i64::<LittleEndian>(*v),
        Value::F64(v) => out.write_f64::<LittleEndian>(*v),
    }
}

fn write_array(out: &mut Vec<u8>, array: &Array) -> io::Result<()> {
    out.write_u32::<LittleEndian>(array.value_type() as u32)?;
    out.write_u64::<LittleEndian>(array.len() as u64)?;
    match array {
        Array::U8(v) => out.write_all(v),
        Array::I8(v) => v.iter().try_for_each(|&x| out.write_i8(x)),
        Array::U16(v) => v.iter().try_for_each(|&x| out.write_u16::<LittleEndian>(x)),
        Array::I16(v) => v.iter().try_for_each(|&x| out.write_i16::<LittleEndian>(x)),
        Array::U32(v) => v.iter().try_for_each(|&x| out.write_u32::<LittleEndian>(x)),
        Array::I32(v) => v.iter().try_for_each(|&x| out.write_i32::<LittleEndian>(x)),
        Array::F32(v) => v.iter().try_for_each(|&x| out.write_f32::<LittleEndian>(x)),
        Array::Bool(v) => v.iter().try_for_each(|&x| out.write_u8(x.into())),
        Array::String(v) => v.iter().try_for_each(|x| write_string(out, x)),
        Array::Array(v) => v.iter().try_for_each(|x| write_array(out, x)),
        Array::U64(v) => v.iter().try_for_each(|&x| out.write_u64::<LittleEndian>(x)),
        Array::I64(v) => v.iter().try_for_each(|&x| out.write_i64::<LittleEndian>(x)),
        Array::F64(v) => v.iter().try_for_each(|&x| out.write_f64::<LittleEndian>(x)),
    }
}
