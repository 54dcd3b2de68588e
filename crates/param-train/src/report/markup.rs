//! Text in markup: whatever a model writes is shown and never read as markup.

use std::fmt::Write;

/// Text for an element's content or a quoted attribute. Control characters, which XML forbids and browsers drop, are shown by
/// their Unicode pictures.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' => out.push(c),
            '\0'..='\x1f' => out.extend(char::from_u32(0x2400 + u32::from(c))),
            '\x7f' => out.push('\u{2421}'),
            '\u{80}'..='\u{9f}' | '\u{fffe}' | '\u{ffff}' => out.push(char::REPLACEMENT_CHARACTER),
            _ => out.push(c),
        }
    }
    out
}

/// Two columns of text as a table.
pub fn pairs(rows: &[(String, String)]) -> String {
    let mut out = String::from("<table class=\"pairs\"><tbody>\n");
    for (name, value) in rows {
        let _ = writeln!(out, "<tr><th scope=\"row\">{}</th><td>{}</td></tr>", escape(name), escape(value));
    }
    out + "</tbody></table>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_stays_text() {
        for hostile in ["</script><svg onload=alert(1)>", "</pre>\"'&amp;", "]]>\0\x1b[31m\u{85}\u{ffff}", "<!--"] {
            let escaped = escape(hostile);
            assert!(!escaped.contains(['<', '>', '"', '\'', '\0', '\x1b']), "{escaped}");
            let document = format!("<p title=\"{escaped}\">{escaped}</p>");
            let document = roxmltree::Document::parse(&document).unwrap();
            let p = document.root_element();
            assert_eq!(p.children().count(), 1, "{escaped}");
            assert_eq!(p.text(), p.attribute("title"));
        }
        assert_eq!(escape("a < b && 日本\n"), "a &lt; b &amp;&amp; 日本\n");
        assert_eq!(escape("\0\x1b\x7f"), "␀␛␡");
    }
}
