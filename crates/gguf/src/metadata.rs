//! The metadata of a file: keys and typed values, in the order in which they were written.

use std::collections::HashMap;

use crate::{Array, Error, MAX_KEY, Result, Value};

/// Keys with their values, in insertion order; a key is there once.
#[derive(Clone, Debug, Default)]
pub struct Metadata {
    entries: Vec<(String, Value)>,
    index: HashMap<String, usize>,
}

impl PartialEq for Metadata {
    fn eq(&self, other: &Metadata) -> bool {
        self.entries == other.entries
    }
}

impl Metadata {
    /// No entries.
    pub fn new() -> Metadata {
        Metadata::default()
    }

    /// Appends an entry. An empty or oversized key, or one that is there already, is an error.
    pub fn insert(&mut self, key: impl Into<String>, value: impl Into<Value>) -> Result<()> {
        let key = key.into();
        if key.is_empty() || key.len() > MAX_KEY {
            return Err(Error::Key { problem: format!("a key has 1 to {MAX_KEY} bytes, this has {}", key.len()), key });
        }
        if self.index.contains_key(&key) {
            return Err(Error::DuplicateKey { key });
        }
        self.index.insert(key.clone(), self.entries.len());
        self.entries.push((key, value.into()));
        Ok(())
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no entries.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The entries in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// The value of a key, whatever its type.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.index.get(key).map(|&i| &self.entries[i].1)
    }

    /// Whether a key is there.
    pub fn contains(&self, key: &str) -> bool {
        self.index.contains_key(key)
    }

    fn require(&self, key: &str) -> Result<&Value> {
        self.get(key).ok_or_else(|| Error::MissingKey { key: key.to_owned() })
    }

    fn typed<'a, T>(&'a self, key: &str, expected: &'static str, pick: impl Fn(&'a Value) -> Option<T>) -> Result<T> {
        let value = self.require(key)?;
        pick(value).ok_or_else(|| {
            let found = match value.integer() {
                Some(v) => format!("{} {v}", value.type_name()),
                None => value.type_name().to_owned(),
            };
            Error::KeyType { key: key.to_owned(), expected, found }
        })
    }

    /// A whole number stored in any width that fits; missing or of another type is an error.
    pub fn u32(&self, key: &str) -> Result<u32> {
        self.typed(key, "u32", |value| value.integer()?.try_into().ok())
    }

    /// A whole number stored in any width that fits; missing or of another type is an error.
    pub fn u64(&self, key: &str) -> Result<u64> {
        self.typed(key, "u64", |value| value.integer()?.try_into().ok())
    }

    /// A number stored as f32, or as f64 and rounded; missing or of another type is an error.
    pub fn f32(&self, key: &str) -> Result<f32> {
        self.typed(key, "f32", |value| match *value {
            Value::F32(v) => Some(v),
            Value::F64(v) => Some(v as f32),
            _ => None,
        })
    }

    /// A truth value; missing or of another type is an error.
    pub fn bool(&self, key: &str) -> Result<bool> {
        self.typed(key, "bool", |value| if let Value::Bool(v) = *value { Some(v) } else { None })
    }

    /// A string; missing or of another type is an error.
    pub fn str(&self, key: &str) -> Result<&str> {
        self.typed(key, "string", |value| if let Value::String(v) = value { Some(v.as_str()) } else { None })
    }

    /// An array of strings; missing or of another type is an error.
    pub fn strings(&self, key: &str) -> Result<&[String]> {
        self.typed(key, "array of string", |value| match value {
            Value::Array(Array::String(v)) => Some(v.as_slice()),
            _ => None,
        })
    }

    /// An array of i32; missing or of another type is an error.
    pub fn i32s(&self, key: &str) -> Result<&[i32]> {
        self.typed(key, "array of i32", |value| match value {
            Value::Array(Array::I32(v)) => Some(v.as_slice()),
            _ => None,
        })
    }

    /// An array of f32; missing or of another type is an error.
    pub fn f32s(&self, key: &str) -> Result<&[f32]> {
        self.typed(key, "array of f32", |value| match value {
            Value::Array(Array::F32(v)) => Some(v.as_slice()),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_numbers_of_any_width_are_read_when_they_fit() {
        let mut metadata = Metadata::new();
        metadata.insert("a", 7u64).unwrap();
        metadata.insert("b", 7i32).unwrap();
        metadata.insert("c", 7u8).unwrap();
        metadata.insert("negative", -1i32).unwrap();
        metadata.insert("large", u64::MAX).unwrap();
        for key in ["a", "b", "c"] {
            assert_eq!(metadata.u32(key).unwrap(), 7);
        }
        assert_eq!(metadata.u64("large").unwrap(), u64::MAX);
        let message = metadata.u32("large").unwrap_err().to_string();
        assert_eq!(message, "metadata key `large`: expected u32, found u64 18446744073709551615");
        assert_eq!(
            metadata.u32("negative").unwrap_err().to_string(),
            "metadata key `negative`: expected u32, found i32 -1"
        );
    }

    #[test]
    fn errors_name_the_key_and_both_types() {
        let mut metadata = Metadata::new();
        metadata.insert("tokens", vec!["a".to_owned()]).unwrap();
        assert_eq!(
            metadata.str("tokens").unwrap_err().to_string(),
            "metadata key `tokens`: expected string, found array of string"
        );
        assert_eq!(metadata.bool("absent").unwrap_err().to_string(), "metadata key `absent` is missing");
        assert!(matches!(metadata.i32s("tokens"), Err(Error::KeyType { expected: "array of i32", .. })));
        assert!(matches!(metadata.f32s("tokens"), Err(Error::KeyType { expected: "array of f32", .. })));
        assert_eq!(metadata.strings("tokens").unwrap(), ["a"]);
    }

    #[test]
    fn a_key_is_there_once_and_has_a_sane_length() {
        let mut metadata = Metadata::new();
        metadata.insert("key", 1u32).unwrap();
        assert!(matches!(metadata.insert("key", 2u32), Err(Error::DuplicateKey { .. })));
        assert!(matches!(metadata.insert("", 2u32), Err(Error::Key { .. })));
        assert!(matches!(metadata.insert("k".repeat(MAX_KEY + 1), 2u32), Err(Error::Key { .. })));
        assert_eq!(metadata.u32("key").unwrap(), 1);
        assert_eq!(metadata.len(), 1);
    }
}
