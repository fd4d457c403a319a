"""Names that Wikipedias give to the same things: namespaces, their languages, templates of disambiguations."""


def _names(text: str, separator: str = "; ") -> tuple[str, ...]:
    return tuple(text.split(separator))


# Also those that a wiki takes beside its own name of the namespace, which its dump does not list
FILES = _names(
    "file; image; media; ファイル; 画像; 文件; 档案; 檔案; 图像; 圖像; 파일; 그림; datei; bild; fichier; archivo; "
    "imagen; immagine; ficheiro; imagem; файл; изображение; зображення; bestand; afbeelding; plik; grafika; fil; "
    "tập tin; hình; berkas; gambar; dosya; resim; tiedosto; kuva; soubor; fájl; kép; fitxer; imatge; קובץ; ملف; "
    "صورة; پرونده; ไฟล์"
)
CATEGORIES = _names(
    "category; カテゴリ; 分类; 分類; 분류; kategorie; catégorie; categoría; categoria; категория; категорія; "
    "kategoria; kategori; thể loại; luokka; kategória; קטגוריה; تصنيف; رده; หมวดหมู่"
)
LANGUAGES = frozenset(
    _names(
        "aa ab ace ady af ak als alt am ami an ang ann anp ar arc ary arz as ast atj av avk awa ay az azb ba ban bar "
        "bat-smg bbc bcl bdr be be-tarask be-x-old bew bg bh bi bjn blk bm bn bo bpy br bs bug bxr ca cbk-zam cdo ce "
        "ceb ch cho chr chy ckb co cr crh cs csb cu cv cy da dag de dga din diq dsb dtp dty dv dz ee el eml en eo es "
        "et eu ext fa fat ff fi fiu-vro fj fo fon fr frp frr fur fy ga gag gan gcr gd gl glk gn gom gor got gpe gu "
        "guc gur guw gv ha hak haw he hi hif ho hr hsb ht hu hy hyw hz ia id ie ig igl ii ik ilo inh io is it iu ja "
        "jam jbo jv ka kaa kab kbd kbp kcg kg kge ki kj kk kl km kn knc ko koi kr krc ks ksh ku kus kv kw ky la lad "
        "lb lbe lez lfn lg li lij lld lmo ln lo lrc lt ltg lv mad mai map-bms mdf mg mh mhr mi min mk ml mn mni mnw "
        "mo mr mrj ms mt mus mwl my myv mzn na nah nap nds nds-nl ne new ng nia nl nn no nov nqo nr nrm nso nv ny oc "
        "olo om or os pa pag pam pap pcd pcm pdc pfl pi pih pl pms pnb pnt ps pt pwn qu rm rmy rn ro roa-rup "
        "roa-tara rsk ru rue rw sa sah sat sc scn sco sd se sg sh shi shn si simple sk skr sl sm smn sn so sq sr srn "
        "ss st stq su sv sw szl szy ta tay tcy tdd te tet tg th ti tk tl tly tn to tpi tr trv ts tt tum tw ty tyv "
        "udm ug uk ur uz ve vec vep vi vls vo wa war wo wuu xal xh xmf yi yo yue za zea zgh zh zh-classical "
        "zh-min-nan zh-yue zu",
        " ",
    )
)
# Whose wikis convert between scripts or spellings, with marks of their own
CONVERTED = frozenset(("zh", "gan", "wuu", "sr", "sh", "kk", "ku", "crh", "iu", "shi", "tg", "uz", "tly", "ban"))
# By language; under no language those of all
DISAMBIGUATIONS = {
    "": _names(
        "disambiguation; disambig; disamb; dab; disambiguation page; disambiguation cleanup; hndis; hndis-cleanup; "
        "geodis; human name disambiguation; place name disambiguation; letter-number combination disambiguation; "
        "schooldis; school disambiguation; hospital disambiguation; airport disambig; airport disambiguation; "
        "callsigndis; mathdab; mathematical disambiguation; mathematics disambiguation; mil-unit-dis; numberdis; "
        "road disambiguation; roaddis; chinese title disambiguation; taxonomy disambiguation; "
        "species latin name disambiguation; species latin name abbreviation disambiguation; latindab; "
        "synagogue disambiguation; church disambiguation"
    ),
    "ja": _names(
        "aimai; 曖昧さ回避; あいまい; あいまいさ回避; 人名の曖昧さ回避; 地名の曖昧さ回避; 同名の鉄道路線; "
        "同名の駅; 学校名の曖昧さ回避; 山の曖昧さ回避; 川の曖昧さ回避; 神社の曖昧さ回避; 人名曖昧さ回避; hndis; "
        "mathematical disambiguation"
    ),
    "zh": _names(
        "disambig; 消歧义; 消歧義; 消歧义页; 消歧義頁; 消歧; 人名消歧义; 人名消歧義; 地名消歧义; 地名消歧義; 多义; "
        "多義; 路牌消歧義; 车站消歧义; 車站消歧義; letter disambig; road disambig; 2cc; 3cc; 中文人名消歧義"
    ),
    "ko": _names("동음이의; 동명이인; 동음이의 문서; 동명이지; 지명 동음이의; 학교 동음이의; 역 동음이의; 동음이의어"),
    "de": _names("begriffsklärung; bks"),
    "fr": _names(
        "homonymie; homonymes; homonymie de patronyme; homonymie de prénom; homonymie d'édifices religieux; "
        "homonymie de clubs sportifs; homonymie de nobles; homonymie de localités; homonymie de bateaux"
    ),
    "es": _names("desambiguación; des; desambiguacion; desamb"),
    "it": _names("disambigua; disambig; sigla2; sigla3"),
    "pt": _names("desambiguação; desambig; dab; desambiguação-nome"),
    "ru": _names("неоднозначность; однофамильцы; список однофамильцев; полные тёзки; многозначность"),
    "uk": _names("неоднозначність; disambig; багатозначність; однофамільці"),
    "nl": _names("dp; dpintro; dp cog; dp vestigingen"),
    "pl": _names("ujednoznacznienie; disambig"),
    "sv": _names("förgrening; grensida; gren; trebokstavsförgrening; efternamn; namnförgrening"),
    "ar": _names("توضيح; صفحة توضيح"),
    "vi": _names("định hướng; trang định hướng; disambig; tên gọi địa danh"),
    "id": _names("disambig; disambiguasi"),
    "tr": _names("anlam ayrımı; anlam ayrım"),
    "fi": _names("täsmennyssivu; haarasivu"),
    "cs": _names("rozcestník"),
    "hu": _names("egyért; egyértelműsítő"),
    "ca": _names("desambiguació; acrònims"),
    "he": _names("פירושונים"),
    "fa": _names("ابهام‌زدایی"),
    "th": _names("แก้กำกวม; แก้ความกำกวม"),
}
