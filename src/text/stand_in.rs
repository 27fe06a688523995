//! The stand-in for a tokenizer, one token a byte, as a tokenizer.json.

use serde_json::{Map, Value, json};

/// What any reader of tokenizer.json makes the same ids of as the stand-in: a byte's value; none
/// for a `vocab` that has not a token for each.
pub(super) fn tokenizer_json(vocab: usize) -> Option<String> {
    if vocab < 256 {
        return None;
    }
    let bytes = (0..=u8::MAX).map(|byte| (character(byte).to_string(), Value::from(byte)));
    let byte_level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false,
    });
    let model = json!({"type": "BPE", "vocab": bytes.collect::<Map<_, _>>(), "merges": []});
    let json = json!({
        "version": "1.0", "added_tokens": [], "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": model,
    });
    Some(json.to_string())
}

/// The character that stands for a byte in byte-level BPE: itself where it can be seen, else one of
/// those from 256 on, in order.
fn character(byte: u8) -> char {
    let seen = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if seen(byte) {
        return byte.into();
    }
    let before = (0..byte).filter(|byte| !seen(*byte)).count() as u32;
    char::from_u32(256 + before).unwrap_or(char::REPLACEMENT_CHARACTER)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_saved_stand_in_makes_the_same_ids() {
        let json = tokenizer_json(300).unwrap();
        let tokenizer: tokenizers::Tokenizer = json.parse().unwrap();
        for text in ["Hi there\n\t", "héllo wörld ", "\u{1F600}\0", ""] {
            let ids = tokenizer.encode(text, false).unwrap().get_ids().to_vec();
            let bytes: Vec<u32> = text.bytes().map(u32::from).collect();
            assert_eq!(ids, bytes);
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        }
        assert!(tokenizer_json(255).is_none());
    }
}
