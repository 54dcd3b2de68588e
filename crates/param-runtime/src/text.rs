//! Bytes of tokens to text as it can be shown: whole characters only, and nothing that may yet turn out a stop string.

/// Text that is not decided yet.
#[derive(Debug, Default)]
pub(crate) struct TextStream {
    pending: Vec<u8>,
    stops: Vec<Vec<u8>>,
}

impl TextStream {
    /// Ends at the first of `stops`; empty ones never match.
    pub fn new(stops: &[String]) -> TextStream {
        let stops = stops.iter().filter(|s| !s.is_empty()).map(|s| s.clone().into_bytes()).collect();
        TextStream { pending: Vec::new(), stops }
    }

    /// Takes the bytes of one token; returns the text they settle, and whether a stop string is complete (the text then ends
    /// before it). Bytes that are no UTF-8 become U+FFFD.
    pub fn push(&mut self, bytes: &[u8]) -> (String, bool) {
        self.pending.extend_from_slice(bytes);
        let first_stop = self.stops.iter().filter_map(|stop| find(&self.pending, stop)).min();
        if let Some(at) = first_stop {
            self.pending.truncate(at);
            return (self.finish(), true);
        }
        let held = self.stops.iter().map(|stop| overlap(&self.pending, stop)).max().unwrap_or(0);
        let end = whole_characters(&self.pending[..self.pending.len() - held]);
        let text = String::from_utf8_lossy(&self.pending[..end]).into_owned();
        self.pending.drain(..end);
        (text, false)
    }

    /// What is left when no more tokens come.
    pub fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        text
    }
}

/// Where `needle` starts in `haystack`.
fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|w| w == needle)
}

/// Length of the longest end of `text` that `stop` begins with.
fn overlap(text: &[u8], stop: &[u8]) -> usize {
    (1..stop.len().min(text.len() + 1)).rev().find(|&n| text.ends_with(&stop[..n])).unwrap_or(0)
}

/// Length without a character at the end that more bytes may complete.
fn whole_characters(bytes: &[u8]) -> usize {
    let mut start = 0;
    loop {
        match std::str::from_utf8(&bytes[start..]) {
            Ok(_) => return bytes.len(),
            Err(e) => match e.error_len() {
                None => return start + e.valid_up_to(),
                Some(n) => start += e.valid_up_to() + n,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// All pieces joined, and whether a stop string ended them. Every piece must be whole by construction of `String`.
    fn stream(bytes: &[u8], cuts: &[usize], stops: &[String]) -> (String, bool) {
        let mut stream = TextStream::new(stops);
        let (mut text, mut start) = (String::new(), 0);
        for &cut in cuts.iter().filter(|&&c| c <= bytes.len()).chain([&bytes.len()]) {
            let (piece, stopped) = stream.push(&bytes[start.min(cut)..cut]);
            text += &piece;
            if stopped {
                return (text, true);
            }
            start = cut;
        }
        (text + &stream.finish(), false)
    }

    proptest! {
        #[test]
        fn pieces_join_to_the_text_however_it_is_cut(text in "[a-cé漢🦀]{0,20}", mut cuts in prop::collection::vec(0usize..80, 0..10)) {
            cuts.sort();
            prop_assert_eq!(stream(text.as_bytes(), &cuts, &[]), (text, false));
        }

        #[test]
        fn any_bytes_become_what_a_lossy_conversion_gives(bytes in prop::collection::vec(any::<u8>(), 0..30), mut cuts in prop::collection::vec(0usize..30, 0..10)) {
            cuts.sort();
            let want = String::from_utf8_lossy(&bytes).into_owned();
            prop_assert_eq!(stream(&bytes, &cuts, &[]).0, want);
        }

        #[test]
        fn text_ends_before_the_first_stop_string_however_it_is_cut(
            text in "[ab漢]{0,20}", stops in prop::collection::vec("[ab漢]{1,3}", 0..3), mut cuts in prop::collection::vec(0usize..40, 0..10),
        ) {
            cuts.sort();
            let (got, stopped) = stream(text.as_bytes(), &cuts, &stops);
            prop_assert_eq!(stopped, stops.iter().any(|s| text.contains(s)));
            prop_assert!(text.starts_with(&got));
            prop_assert!(!stops.iter().any(|s| got.contains(s)));
            if stopped {
                // A stop string that completes first wins even where another starts earlier.
                prop_assert!(stops.iter().any(|s| text[got.len()..].starts_with(s.as_str())));
            } else {
                prop_assert_eq!(got, text);
            }
        }
    }

    #[test]
    fn characters_and_stop_strings_wait_for_their_last_byte() {
        let mut stream = TextStream::new(&["</end>".into(), String::new()]);
        assert_eq!(stream.push(&[b'a', 0xf0, 0x9f]), ("a".into(), false));
        assert_eq!(stream.push(&[0xa6, 0x80, b'b']), ("🦀b".into(), false));
        assert_eq!(stream.push(b"c</e"), ("c".into(), false));
        assert_eq!(stream.push(b"x</"), ("</ex".into(), false));
        assert_eq!(stream.push(b"end> never"), (String::new(), true));
        assert_eq!(stream.finish(), "");
    }
}
