//! Where text can be cut so that tokenizing the parts equals tokenizing the whole.
//!
//! The pre-tokenizers of byte-level BPE models (GPT-2's pattern, and Llama 3's) match from left to right without
//! looking back, and look ahead only past whitespace. Some places are the border of two matches under both of them,
//! whatever surrounds: after the last letter of a word or digit of a number; before a space that a non-space follows
//! (that space starts a match); after a newline that stands alone between non-spaces (a run of newlines is divided
//! differently by the two). BPE merges never cross such a border, so the tokens of the parts, joined, are those of
//! the whole.

/// True if `text` can be cut at byte `at`, a character boundary strictly inside it.
pub fn is_cut(text: &str, at: usize) -> bool {
    let bytes = text.as_bytes();
    match (bytes[at - 1], bytes[at]) {
        (_, b' ') => at + 1 < bytes.len() && !space_at(text, at + 1),
        // Only ASCII: what \p{L} and \p{N} take beyond is not what `char` calls alphabetic and numeric.
        (b'a'..=b'z' | b'A'..=b'Z', next) => next.is_ascii() && !next.is_ascii_alphabetic(),
        (b'0'..=b'9', next) => next.is_ascii() && !next.is_ascii_digit(),
        (b'\n', _) => at >= 2 && !space_before(text, at - 1) && !space_at(text, at),
        _ => false,
    }
}

/// The last place in `text` to cut that is beside whitespace and divides no run of it: it suits pre-tokenizers beyond
/// the two as well, and falls into no added token that has no whitespace itself.
pub fn last_cut(text: &str) -> Option<usize> {
    let bytes = text.as_bytes();
    let beside_space = |at: usize| bytes[at - 1] == b'\n' || bytes[at] == b' ' && !space_before(text, at);
    (1..bytes.len()).rev().find(|&at| is_cut(text, at) && beside_space(at))
}

/// True if the character that starts at byte `at` is whitespace.
pub fn space_at(text: &str, at: usize) -> bool {
    match text.as_bytes()[at] {
        b @ 0..0x80 => is_ascii_space(b),
        _ => text[at..].chars().next().is_some_and(char::is_whitespace),
    }
}

/// True if the character that ends at byte `at` is whitespace.
pub fn space_before(text: &str, at: usize) -> bool {
    match text.as_bytes()[at - 1] {
        b @ 0..0x80 => is_ascii_space(b),
        _ => text[..at].chars().next_back().is_some_and(char::is_whitespace),
    }
}

/// As `\s` in a Unicode regex, so with vertical tab, unlike `u8::is_ascii_whitespace`.
fn is_ascii_space(byte: u8) -> bool {
    matches!(byte, b'\t'..=b'\r' | b' ')
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `text` with a bar at each cut.
    fn cuts(text: &str) -> String {
        let mut parts = String::new();
        for (at, c) in text.char_indices() {
            if at > 0 && is_cut(text, at) {
                parts.push('|');
            }
            parts.push(c);
        }
        parts
    }

    #[test]
    fn words_and_numbers_end_where_something_else_follows() {
        assert_eq!(cuts("ab cd, ef"), "ab| cd|,| ef");
        assert_eq!(cuts("it's x1.50"), "it|'s| x|1|.50");
        assert_eq!(cuts("naïve٣é1é"), "naïve٣é1é", "outside ASCII nothing is assumed");
    }

    #[test]
    fn of_several_spaces_only_the_last_is_cut_before() {
        assert_eq!(cuts(".  ."), ". | .");
        assert_eq!(cuts(".\n\t ."), ".\n\t| .");
        assert_eq!(cuts(". \u{3000}."), ". \u{3000}.", "an ideographic space is whitespace too");
    }

    #[test]
    fn lone_newline_is_cut_after_and_a_run_is_not() {
        assert_eq!(cuts(".\n."), ".\n|.");
        assert_eq!(cuts(".\n\n."), ".\n\n.");
        assert_eq!(cuts(".\r\n."), ".\r\n.");
        assert_eq!(cuts("。\nだ"), "。\n|だ");
    }

    #[test]
    fn whitespace_at_the_ends_is_not_cut() {
        assert_eq!(cuts(" . "), " . ");
        assert_eq!(cuts("\n.\n"), "\n.\n");
    }

    #[test]
    fn last_cut_is_beside_whitespace_and_in_no_run_of_it() {
        assert_eq!(last_cut("ab cd, ef"), Some(6));
        assert_eq!(last_cut("ab\ncd  ef"), Some(3));
        assert_eq!(last_cut("ab,cd"), None);
        assert_eq!(last_cut(""), None);
    }
}
