//! One line of JSONL to the document in its text field, without building what is not needed.

use std::borrow::Cow;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::report::Reason;

/// The text of `line` (no newline at its end), `None` if the line is blank.
///
/// Only the text field is kept in memory, so a hostile line costs at most its own length again. Of a repeated field
/// the last one counts, as in most JSON readers.
///
/// # Errors
/// The reason why the line has no document.
pub fn document<'a>(line: &'a [u8], field: &str) -> Result<Option<Cow<'a, str>>, Reason> {
    if line.trim_ascii().is_empty() {
        return Ok(None);
    }
    let line = std::str::from_utf8(line).map_err(|_| Reason::NotUtf8Line)?;
    let mut json = serde_json::Deserializer::from_str(line);
    let value = json.deserialize_any(Line { field }).and_then(|value| json.end().map(|()| value));
    match value.map_err(|_| Reason::BadJson)? {
        Field::Text(text) if text.trim().is_empty() => Err(Reason::EmptyText),
        Field::Text(text) => Ok(Some(text)),
        Field::Missing => Err(Reason::MissingField),
        Field::Other => Err(Reason::NotAString),
    }
}

enum Field<'a> {
    Missing,
    Other,
    Text(Cow<'a, str>),
}

/// Any value that is not what was looked for is consumed and answered with the same constant.
macro_rules! otherwise {
    ($answer:expr) => {
        fn visit_bool<E: Error>(self, _: bool) -> Result<Self::Value, E> {
            Ok($answer)
        }
        fn visit_i64<E: Error>(self, _: i64) -> Result<Self::Value, E> {
            Ok($answer)
        }
        fn visit_u64<E: Error>(self, _: u64) -> Result<Self::Value, E> {
            Ok($answer)
        }
        fn visit_f64<E: Error>(self, _: f64) -> Result<Self::Value, E> {
            Ok($answer)
        }
        fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
            Ok($answer)
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
            while seq.next_element::<IgnoredAny>()?.is_some() {}
            Ok($answer)
        }
    };
}

/// The whole line: an object whose `field` is wanted.
struct Line<'f> {
    field: &'f str,
}

impl<'de> Visitor<'de> for Line<'_> {
    type Value = Field<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Field<'de>, A::Error> {
        let mut found = Field::Missing;
        while let Some(wanted) = map.next_key_seed(Key { field: self.field })? {
            if wanted {
                found = map.next_value_seed(Value)?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(found)
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<Field<'de>, E> {
        Ok(Field::Missing)
    }

    otherwise!(Field::Missing);
}

/// A key: is it the wanted one?
struct Key<'f> {
    field: &'f str,
}

impl<'de> DeserializeSeed<'de> for Key<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, key: D) -> Result<bool, D::Error> {
        key.deserialize_str(self)
    }
}

impl Visitor<'_> for Key<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: Error>(self, key: &str) -> Result<bool, E> {
        Ok(key == self.field)
    }
}

/// The value of the wanted key.
struct Value;

impl<'de> DeserializeSeed<'de> for Value {
    type Value = Field<'de>;

    fn deserialize<D: Deserializer<'de>>(self, value: D) -> Result<Field<'de>, D::Error> {
        value.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Value {
    type Value = Field<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_borrowed_str<E: Error>(self, text: &'de str) -> Result<Field<'de>, E> {
        Ok(Field::Text(Cow::Borrowed(text)))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Field<'de>, E> {
        Ok(Field::Text(Cow::Owned(text.to_owned())))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Field<'de>, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Field::Other)
    }

    otherwise!(Field::Other);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(line: &str) -> Result<Option<String>, Reason> {
        document(line.as_bytes(), "text").map(|t| t.map(Cow::into_owned))
    }

    #[test]
    fn text_is_found_among_other_fields_and_unescaped() {
        assert_eq!(text(r#"{"id": 1, "text": "a\n\u00e9", "meta": {"text": ["x"]}}"#), Ok(Some("a\né".into())));
        assert_eq!(text("{\"text\": \"plain\"}\r"), Ok(Some("plain".into())));
        assert_eq!(text(r#"{"text": "a", "text": "b"}"#), Ok(Some("b".into())));
    }

    #[test]
    fn each_kind_of_bad_line_has_its_reason() {
        for (line, reason) in [
            ("{\"text\": \"cut of", Reason::BadJson),
            ("{\"text\": \"a\"} trailing", Reason::BadJson),
            ("not json", Reason::BadJson),
            (r#"{"text": "\ud800"}"#, Reason::BadJson),
            (r#"{"body": "a"}"#, Reason::MissingField),
            (r#"["text"]"#, Reason::MissingField),
            ("\"text\"", Reason::MissingField),
            ("17", Reason::MissingField),
            (r#"{"text": 3}"#, Reason::NotAString),
            (r#"{"text": null}"#, Reason::NotAString),
            (r#"{"text": {"a": ["b"]}}"#, Reason::NotAString),
            (r#"{"text": ""}"#, Reason::EmptyText),
            (r#"{"text": " \n "}"#, Reason::EmptyText),
        ] {
            assert_eq!(text(line), Err(reason), "{line}");
        }
        assert_eq!(document(b"{\"text\": \"\xff\"}", "text"), Err(Reason::NotUtf8Line));
    }

    #[test]
    fn blank_line_is_no_document_and_no_error() {
        assert_eq!(text(""), Ok(None));
        assert_eq!(text(" \t\r"), Ok(None));
    }

    #[test]
    fn deep_nesting_is_an_error_and_no_stack_overflow() {
        let line = format!("{{\"text\": {}", "[".repeat(1 << 20));
        assert_eq!(text(&line), Err(Reason::BadJson));
    }
}
