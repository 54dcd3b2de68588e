//! The header of one file: bytes to metadata and tensor infos, with every count held against the bytes that are left.

use std::collections::HashSet;

use byteorder::{ByteOrder, LittleEndian};

use crate::value::ValueType;
use crate::{
    Array, DEFAULT_ALIGNMENT, Error, GgmlType, KEY_ALIGNMENT, MAGIC, MAX_DIMS, MAX_KEY, MAX_TENSOR_NAME, Metadata,
    Result, TensorInfo, VERSION, Value,
};

/// Arrays nest at most this deep: the parser recurses, and no known file nests at all.
const MAX_DEPTH: usize = 4;
/// The least a tensor info takes: name length, one byte of name, dimension count, one dimension, type, offset.
const MIN_TENSOR_INFO: u64 = 8 + 1 + 4 + 8 + 4 + 8;
/// The least an entry takes: key length, one byte of key, type, one byte of value.
const MIN_ENTRY: u64 = 8 + 1 + 4 + 1;

/// A header whose tensors are known to lie within the file.
pub(crate) struct Header {
    pub(crate) metadata: Metadata,
    pub(crate) tensors: Vec<TensorInfo>,
    /// Where tensor data starts, in bytes from the start of the file.
    pub(crate) data_start: u64,
}

/// Reads and checks the header of a whole file.
pub(crate) fn header(file: &[u8]) -> Result<Header> {
    let mut cursor = Cursor { file, at: 0 };
    if file.get(..4) != Some(&MAGIC) {
        return Err(Error::Magic { found: file[..file.len().min(4)].to_vec() });
    }
    cursor.at = 4;
    match cursor.u32("version")? {
        2 | VERSION => {}
        version if matches!(version.swap_bytes(), 1..=VERSION) => return Err(Error::BigEndian),
        found => return Err(Error::Version { found }),
    }
    let n_tensor = cursor.u64("tensor count")?;
    let n_entry = cursor.u64("metadata count")?;
    cursor.expect_room("tensor infos", n_tensor, MIN_TENSOR_INFO)?;
    cursor.expect_room("metadata entries", n_entry, MIN_ENTRY)?;

    let mut metadata = Metadata::new();
    for _ in 0..n_entry {
        let at = cursor.at;
        let key = cursor.string("metadata key")?;
        if key.len() > MAX_KEY {
            return Err(malformed("metadata key", at, format!("{} bytes, at most {MAX_KEY} are allowed", key.len())));
        }
        let key = key.to_owned();
        let ty = cursor.value_type()?;
        let value = cursor.value(ty)?;
        metadata.insert(key, value)?;
    }
    let alignment = alignment(&metadata)?;

    let n_tensor = cursor.expect_room("tensor infos", n_tensor, MIN_TENSOR_INFO)?;
    let mut tensors = Vec::with_capacity(n_tensor);
    for _ in 0..n_tensor {
        tensors.push(cursor.tensor_info()?);
    }
    let data_start = padded(cursor.at as u64, alignment).ok_or(Error::Truncated {
        what: "tensor data",
        at: cursor.at as u64,
        needed: alignment,
        left: cursor.left(),
    })?;
    check_layout(&tensors, alignment, (file.len() as u64).saturating_sub(data_start))?;
    Ok(Header { metadata, tensors, data_start })
}

/// The alignment that metadata asks for; the format wants a power of two and a multiple of 8.
pub(crate) fn alignment(metadata: &Metadata) -> Result<u64> {
    if !metadata.contains(KEY_ALIGNMENT) {
        return Ok(DEFAULT_ALIGNMENT);
    }
    let alignment = u64::from(metadata.u32(KEY_ALIGNMENT)?);
    if alignment < 8 || !alignment.is_power_of_two() {
        let problem = format!("expected a power of two of at least 8, found {alignment}");
        return Err(Error::Key { key: KEY_ALIGNMENT.to_owned(), problem });
    }
    Ok(alignment)
}

/// `n` rounded up to the alignment, unless that leaves 64 bits.
pub(crate) fn padded(n: u64, alignment: u64) -> Option<u64> {
    n.checked_next_multiple_of(alignment)
}

/// Tensors lie one after the other, each at the next aligned offset, all within the data: no gaps, no overlaps.
fn check_layout(tensors: &[TensorInfo], alignment: u64, n_data: u64) -> Result<()> {
    let mut names = HashSet::with_capacity(tensors.len());
    let mut expected = 0u64;
    for tensor in tensors {
        let error = |problem| Err(Error::Tensor { name: tensor.name.clone(), problem });
        if !names.insert(tensor.name.as_str()) {
            return Err(Error::DuplicateTensor { name: tensor.name.clone() });
        }
        if tensor.offset != expected {
            return error(format!("expected at offset {expected} of the tensor data, found at {}", tensor.offset));
        }
        let end = tensor.offset.checked_add(tensor.n_bytes).filter(|&end| end <= n_data);
        let Some(next) = end.and_then(|end| padded(end, alignment)) else {
            let (offset, n_bytes) = (tensor.offset, tensor.n_bytes);
            return error(format!(
                "{n_bytes} bytes at offset {offset} pass the end of the {n_data} bytes of tensor data (truncated or corrupt)"
            ));
        };
        expected = next;
    }
    Ok(())
}

fn malformed(what: &'static str, at: usize, problem: String) -> Error {
    Error::Malformed { what, at: at as u64, problem }
}

struct Cursor<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn left(&self) -> u64 {
        (self.file.len() - self.at) as u64
    }

    /// Whether `n` items of at least `size` bytes can follow; `n` as an allocation may then use it.
    fn expect_room(&self, what: &'static str, n: u64, size: u64) -> Result<usize> {
        let needed = n.saturating_mul(size);
        if needed > self.left() {
            return Err(Error::Truncated { what, at: self.at as u64, needed, left: self.left() });
        }
        Ok(n as usize) // at most the length of a slice
    }

    fn take(&mut self, what: &'static str, n: u64) -> Result<&'a [u8]> {
        let n = self.expect_room(what, n, 1)?;
        let taken = &self.file[self.at..self.at + n];
        self.at += n;
        Ok(taken)
    }

    fn u32(&mut self, what: &'static str) -> Result<u32> {
        Ok(LittleEndian::read_u32(self.take(what, 4)?))
    }

    fn u64(&mut self, what: &'static str) -> Result<u64> {
        Ok(LittleEndian::read_u64(self.take(what, 8)?))
    }

    fn string(&mut self, what: &'static str) -> Result<&'a str> {
        let n = self.u64(what)?;
        let at = self.at;
        std::str::from_utf8(self.take(what, n)?).map_err(|e| malformed(what, at, format!("not UTF-8: {e}")))
    }

    fn bool(&mut self) -> Result<bool> {
        let at = self.at;
        match self.take("bool", 1)?[0] {
            0 => Ok(false),
            1 => Ok(true),
            byte => Err(malformed("bool", at, format!("expected 0 or 1, found {byte}"))),
        }
    }

    fn value_type(&mut self) -> Result<ValueType> {
        let at = self.at;
        let id = self.u32("value type")?;
        ValueType::from_id(id).ok_or_else(|| malformed("value type", at, format!("expected 0 to 12, found {id}")))
    }

    fn value(&mut self, ty: ValueType) -> Result<Value> {
        const WHAT: &str = "metadata value";
        Ok(match ty {
            ValueType::U8 => Value::U8(self.take(WHAT, 1)?[0]),
            ValueType::I8 => Value::I8(self.take(WHAT, 1)?[0] as i8),
            ValueType::U16 => Value::U16(LittleEndian::read_u16(self.take(WHAT, 2)?)),
            ValueType::I16 => Value::I16(LittleEndian::read_i16(self.take(WHAT, 2)?)),
            ValueType::U32 => Value::U32(self.u32(WHAT)?),
            ValueType::I32 => Value::I32(LittleEndian::read_i32(self.take(WHAT, 4)?)),
            ValueType::F32 => Value::F32(LittleEndian::read_f32(self.take(WHAT, 4)?)),
            ValueType::Bool => Value::Bool(self.bool()?),
            ValueType::String => Value::String(self.string(WHAT)?.to_owned()),
            ValueType::Array => Value::Array(self.array(1)?),
            ValueType::U64 => Value::U64(self.u64(WHAT)?),
            ValueType::I64 => Value::I64(LittleEndian::read_i64(self.take(WHAT, 8)?)),
            ValueType::F64 => Value::F64(LittleEndian::read_f64(self.take(WHAT, 8)?)),
        })
    }

    fn array(&mut self, depth: usize) -> Result<Array> {
        const WHAT: &str = "array";
        if depth > MAX_DEPTH {
            return Err(malformed(WHAT, self.at, format!("nested deeper than {MAX_DEPTH}")));
        }
        let ty = self.value_type()?;
        let n = self.u64(WHAT)?;
        let n = self.expect_room(WHAT, n, ty.min_size())?;
        macro_rules! numbers {
            ($variant:ident, $read_into:ident) => {{
                let mut v = vec![Default::default(); n];
                LittleEndian::$read_into(self.take(WHAT, n as u64 * ty.min_size())?, &mut v);
                Array::$variant(v)
            }};
        }
        Ok(match ty {
            ValueType::U8 => Array::U8(self.take(WHAT, n as u64)?.to_vec()),
            ValueType::I8 => Array::I8(self.take(WHAT, n as u64)?.iter().map(|&byte| byte as i8).collect()),
            ValueType::U16 => numbers!(U16, read_u16_into),
            ValueType::I16 => numbers!(I16, read_i16_into),
            ValueType::U32 => numbers!(U32, read_u32_into),
            ValueType::I32 => numbers!(I32, read_i32_into),
            ValueType::F32 => numbers!(F32, read_f32_into),
            ValueType::U64 => numbers!(U64, read_u64_into),
            ValueType::I64 => numbers!(I64, read_i64_into),
            ValueType::F64 => numbers!(F64, read_f64_into),
            ValueType::Bool => Array::Bool((0..n).map(|_| self.bool()).collect::<Result<_>>()?),
            ValueType::String => {
                Array::String((0..n).map(|_| Ok(self.string(WHAT)?.to_owned())).collect::<Result<_>>()?)
            }
            ValueType::Array => Array::Array((0..n).map(|_| self.array(depth + 1)).collect::<Result<_>>()?),
        })
    }

    fn tensor_info(&mut self) -> Result<TensorInfo> {
        const WHAT: &str = "tensor info";
        let at = self.at;
        let name = self.string("tensor name")?.to_owned();
        // One byte more than is written: some writers do not count the final zero.
        if name.is_empty() || name.len() > MAX_TENSOR_NAME + 1 {
            let problem = format!("expected 1 to {} bytes, found {}", MAX_TENSOR_NAME + 1, name.len());
            return Err(malformed("tensor name", at, problem));
        }
        let n_dims = self.u32(WHAT)? as usize;
        if n_dims == 0 || n_dims > MAX_DIMS {
            let problem = format!("expected 1 to {MAX_DIMS} dimensions, found {n_dims}");
            return Err(Error::Tensor { name, problem });
        }
        let ne = (0..n_dims).map(|_| self.u64(WHAT)).collect::<Result<Vec<_>>>()?;
        let id = self.u32(WHAT)?;
        let Some(ty) = GgmlType::from_id(id) else {
            return Err(Error::Tensor { name, problem: format!("its type {id} is unknown or retired") });
        };
        let offset = self.u64(WHAT)?;
        Ok(TensorInfo { offset, ..TensorInfo::new(name, ne, ty)? })
    }
}
