//! Divides text into words as the patterns of GPT-2 and of Llama 3 do, in one pass by hand: a general regex engine spends
//! several times what all the rest of tokenizing takes.

use std::sync::LazyLock;

use regex_syntax::hir::{Class as Set, HirKind};

/// A pattern whose matches, from left to right, are the words of a text; every character is in one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
    Gpt2,
    /// `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`
    Llama3,
}

/// What the patterns tell characters apart by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Class {
    Other,
    /// `\s`
    Space,
    /// `\p{L}`
    Letter,
    /// `\p{N}`
    Number,
}

/// The class of every code point, by the tables of the regex crate: the standard library has none of `\p{L}`, and follows
/// another version of Unicode.
static CLASSES: LazyLock<Box<[Class]>> = LazyLock::new(|| {
    let mut classes = vec![Class::Other; char::MAX as usize + 1].into_boxed_slice(); // [0x110000]
    for (class, pattern) in [(Class::Space, r"\s"), (Class::Letter, r"\p{L}"), (Class::Number, r"\p{N}")] {
        let hir = regex_syntax::parse(pattern).expect("a valid pattern");
        let HirKind::Class(Set::Unicode(set)) = hir.kind() else { unreachable!("a class of characters") };
        for range in set.ranges() {
            classes[range.start() as usize..=range.end() as usize].fill(class);
        }
    }
    classes
});

/// Calls `word` with the words of `text`, in order.
pub fn split<'t, E>(pattern: Pattern, text: &'t str, mut word: impl FnMut(&'t str) -> Result<(), E>) -> Result<(), E> {
    let text = Text { text, classes: &CLASSES };
    let mut start = 0;
    while start < text.text.len() {
        let end = match pattern {
            Pattern::Gpt2 => text.gpt_2(start),
            Pattern::Llama3 => text.llama_3(start),
        };
        word(&text.text[start..end])?;
        start = end;
    }
    Ok(())
}

struct Text<'t> {
    text: &'t str,
    classes: &'static [Class],
}

impl Text<'_> {
    /// The end of the word that starts at byte `start`.
    fn gpt_2(&self, start: usize) -> usize {
        if let Some(end) = self.contraction(start, |letter| letter) {
            return end;
        }
        let from = start + usize::from(self.byte(start) == Some(b' '));
        match self.class(from) {
            Some((class, _)) if class != Class::Space => self.run(from, class),
            _ => self.space(start),
        }
    }

    /// The same in the other pattern.
    fn llama_3(&self, start: usize) -> usize {
        if let Some(end) = self.contraction(start, |letter| letter.to_ascii_lowercase()) {
            return end;
        }
        let (class, len) = self.class(start).expect("not the end");
        let is_newline = |at| matches!(self.byte(at), Some(b'\r' | b'\n'));
        match class {
            Class::Letter => return self.run(start, Class::Letter),
            Class::Number => {
                let digit = |at: usize| match self.class(at) {
                    Some((Class::Number, len)) => at + len,
                    _ => at,
                };
                return digit(digit(start + len));
            }
            _ => {}
        }
        if !is_newline(start) && self.is(start + len, Class::Letter) {
            return self.run(start + len, Class::Letter);
        }
        let from = start + usize::from(self.byte(start) == Some(b' '));
        if self.is(from, Class::Other) {
            let mut end = self.run(from, Class::Other);
            while is_newline(end) {
                end += 1;
            }
            return end;
        }
        let run = self.run(start, Class::Space);
        match memchr::memrchr2(b'\r', b'\n', &self.text.as_bytes()[start..run]) {
            Some(newline) => start + newline + 1,
            None => self.space(start),
        }
    }

    /// `\s+(?!\S)|\s+`: all whitespace but for its last character where something follows, unless that is all there is.
    fn space(&self, start: usize) -> usize {
        let end = self.run(start, Class::Space);
        if end == self.text.len() {
            return end;
        }
        let last = self.text[start..end].chars().next_back().map_or(0, char::len_utf8);
        if end - last > start { end - last } else { end }
    }

    /// The end of an apostrophe and `s`, `t`, `m`, `d`, `re`, `ve` or `ll`, each letter as `fold` gives it.
    fn contraction(&self, start: usize, fold: impl Fn(u8) -> u8) -> Option<usize> {
        if self.byte(start) != Some(b'\'') {
            return None;
        }
        let letter = |at| self.byte(at).map(&fold);
        match (letter(start + 1)?, letter(start + 2)) {
            (b's' | b't' | b'm' | b'd', _) => Some(start + 2),
            (b'r' | b'v', Some(b'e')) | (b'l', Some(b'l')) => Some(start + 3),
            // A long s is an s to whom case does not matter.
            (0xC5, Some(0xBF)) if fold(b'S') == b's' => Some(start + 3),
            _ => None,
        }
    }

    fn byte(&self, at: usize) -> Option<u8> {
        self.text.as_bytes().get(at).copied()
    }

    /// Class and length of the character at byte `at`, `None` at the end.
    fn class(&self, at: usize) -> Option<(Class, usize)> {
        let byte = self.byte(at)?;
        if byte < 0x80 {
            return Some((self.classes[usize::from(byte)], 1));
        }
        let c = self.text[at..].chars().next()?;
        Some((self.classes[c as usize], c.len_utf8()))
    }

    fn is(&self, at: usize, class: Class) -> bool {
        self.class(at).is_some_and(|(found, _)| found == class)
    }

    /// The end of the characters of `class` from byte `at` on.
    fn run(&self, mut at: usize, class: Class) -> usize {
        while let Some((found, len)) = self.class(at)
            && found == class
        {
            at += len;
        }
        at
    }
}
